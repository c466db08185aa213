"""``tests/slow.txt``, which ``-m "not slow"`` leaves out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tests.conftest import ROOT
from tests.support import slow


def test_every_test_that_the_list_names_is_there() -> None:
    gone = []
    for one in slow.listed():
        file, _, name = one.partition("::")
        path = ROOT / file
        if not path.is_file() or not re.search(rf"^\s*def {name}\(", path.read_text(encoding="utf-8"), re.MULTILINE):
            gone.append(one)
    assert not gone, "renamed or removed: change tests/slow.txt"


@pytest.fixture(scope="module")
def dear() -> None: ...


@pytest.mark.usefixtures("dear")
def test_a_test_is_slow_by_itself_by_its_cases_or_by_a_fixture(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    mine = request.node.nodeid

    def found(*figures: dict[str, object]) -> list[str]:
        record = tmp_path / "figures.jsonl"
        record.write_text("".join(json.dumps(one) + "\n" for one in figures))
        return slow.slow_tests([request.node], record)

    assert found({"test": mine, "seconds": 0.9 * slow.LIMIT}, {"test": "gone", "seconds": 100}) == []
    assert found({"test": mine, "seconds": 1.1 * slow.LIMIT}) == [mine]
    cases = [{"test": f"{mine}[{case}]", "seconds": 0.9 * slow.LIMIT} for case in range(6)]
    assert found(*cases[:5]) == []
    assert found(*cases) == [mine]
    fixture = f"{mine.partition('::')[0]}::dear"
    assert found({"fixture": fixture, "seconds": 0.9 * slow.LIMIT}) == []
    assert found({"fixture": fixture, "seconds": 1.1 * slow.LIMIT}) == [mine]
