"""``kedge target list``: backends, precisions, how far a bundle can be proved here, what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kedge.cli.main import main
from kedge_protocol.bundle.config import Verified
from kedge_targets import registry, toolchain
from kedge_targets import target as targets
from kedge_targets.target_survey import survey


@pytest.fixture
def no_toolchains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEDGE_DATA", str(tmp_path))


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["target", "list", *arguments])
    assert not ended.value.code
    return capsys.readouterr().out


def test_each_target_is_there_with_what_its_backends_say() -> None:
    found = {one.name: one for one in survey()}
    assert sorted(found) == targets.names()
    for name, one in found.items():
        target = targets.find(name)
        assert [backend.name for backend in one.backends] == [choice.name for choice in target.backends]
        assert one.firmware
        for backend in one.backends:
            compiler = registry.compiler(backend.name)
            assert backend.precisions == tuple(precision.value for precision in compiler.numerics.precisions)
            assert backend.verification is compiler.verification(target)
            assert backend.missing == compiler.missing()
            assert backend.here is (None if backend.missing else backend.verification)


@pytest.mark.usefixtures("no_toolchains")
def test_without_a_toolchain_what_needs_it_says_how_to_get_it(capsys: pytest.CaptureFixture[str]) -> None:
    needing = {backend.name for one in survey() for backend in one.backends if backend.name in toolchain.names()}
    assert needing
    text = said(capsys)
    for name in needing:
        assert f"kedge toolchain install {name}" in text
    assert "none yet (" in text


def test_programs_read_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    found: list[dict[str, Any]] = json.loads(said(capsys, "--json"))
    rows = {one["name"]: one for one in found}
    assert rows["generic-cpu"]["backends"][0]["verification"] == Verified.EXECUTED.value
    assert rows["rpi4"]["backends"][0]["precisions"] == ["int8", "int8-dynamic", "float16", "float32"]
    assert rows["rpi4"]["firmware"] == ["common", "raspberry-pi"]


def test_words_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys)
    for one in survey():
        assert one.name in text
        for backend in one.backends:
            assert f"\n{backend.verification.value}: " in text
