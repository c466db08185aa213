"""Marks as ``slow`` the tests that ``tests/slow.txt`` names, so that ``-m "not slow"`` is quick.

The list is written anew from measured figures: ``pytest --cpu-record=FIGURES``, then
``pytest --collect-only -q --update-slow=FIGURES``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

LIST = Path(__file__).resolve().parent.parent / "slow.txt"
LIMIT = 1.0
"""CPU seconds of one test, children included and shared fixtures too; of all cases of one test five times as much."""
_HEAD = "# CPU seconds above the limit; written by pytest --update-slow, see CONTRIBUTING.md.\n"


def listed() -> list[str]:
    """The tests of the list, as ``path::name`` without parameters."""
    return [line for line in LIST.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]


def _name(nodeid: str) -> str:
    return nodeid.partition("[")[0]


def _shared_fixtures(item: pytest.Item) -> set[str]:
    """Names of the fixtures of a test that outlive it, as ``--cpu-record`` writes them."""
    found = getattr(item, "_fixtureinfo").name2fixturedefs.values()  # noqa: B009 -- private to pytest, typed nowhere
    return {f"{one.baseid or 'plugin'}::{one.argname}" for defs in found for one in defs if one.scope != "function"}


def slow_tests(items: list[pytest.Item], record: Path) -> list[str]:
    """What the list must hold, by the figures of ``--cpu-record``."""
    tests: dict[str, dict[str, float]] = {}
    fixtures: dict[str, float] = {}
    for line in record.read_text(encoding="utf-8").splitlines():
        figures = json.loads(line)
        if "test" in figures:
            tests.setdefault(_name(figures["test"]), {})[figures["test"]] = figures["seconds"]
        else:
            fixtures[figures["fixture"]] = max(fixtures.get(figures["fixture"], 0.0), figures["seconds"])
    slow = {
        name for name, seconds in tests.items() if max(seconds.values()) > LIMIT or sum(seconds.values()) > 5 * LIMIT
    }
    dear = {name for name, seconds in fixtures.items() if seconds > LIMIT}
    slow |= {_name(item.nodeid) for item in items if dear & _shared_fixtures(item)}
    return sorted(slow & {_name(item.nodeid) for item in items})


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-slow", type=Path, metavar="FIGURES", help="write tests/slow.txt from --cpu-record's file"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if (record := config.getoption("--update-slow")) is not None:
        LIST.write_text(_HEAD + "".join(f"{name}\n" for name in slow_tests(items, record)), encoding="utf-8")
    names = set(listed())
    for item in items:
        if _name(item.nodeid) in names:
            item.add_marker(pytest.mark.slow)
