"""CPU seconds of each test and each shared fixture, child processes included (``--cpu-durations N``): the same on an
idle machine and on a busy one, which ``--durations`` is not."""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

_TICKS = os.sysconf("SC_CLK_TCK")


def _seconds(pid: str | int) -> float:
    """User and system time of a live process, of its dead children that it waited for, and of its live descendants.

    See proc(5): fields 14 to 17 of ``/proc/PID/stat``.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = [
            child for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
        ]
    except (OSError, ProcessLookupError):
        return 0.0
    return sum(map(int, fields[11:15])) / _TICKS + sum(map(_seconds, children))


class CpuDurations:
    """Measures in every process that runs tests, prints in the one that the user started.

    Args:
        shown: how many tests, and how many fixtures, are printed; 0: all.
        record: a file that gets a JSON line for each test at its end, so that a run cut short leaves figures too.
    """

    def __init__(self, shown: int, record: Path | None) -> None:
        self._shown = shown
        self._record = record
        self._open: list[dict[str, float]] = []
        self._fixtures: list[tuple[str, float]] = []
        self._tests: dict[str, float] = {}
        self._totals: dict[str, float] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Generator[None, object, object]:
        if fixturedef.scope == "function":
            return (yield)
        start, nested = _seconds(os.getpid()), {"sum": 0.0}
        self._open.append(nested)
        try:
            return (yield)
        finally:
            self._open.pop()
            spent = _seconds(os.getpid()) - start
            if self._open:
                self._open[-1]["sum"] += spent
            name = f"{fixturedef.baseid or 'plugin'}::{fixturedef.argname}"
            self._fixtures.append((name, round(spent - nested["sum"], 3)))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Generator[None, object, object]:
        self._start = _seconds(os.getpid())
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        now = _seconds(os.getpid())
        # Attributes of a report travel from an xdist worker to its controller.
        # What a grandchild had used is lost with it where its parent was killed before: never less than nothing.
        report.cpu_seconds, report.cpu_fixtures = round(max(0.0, now - self._start), 3), self._fixtures
        self._start, self._fixtures = now, []
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if "PYTEST_XDIST_WORKER" in os.environ:  # its controller hears the same
            return
        fixtures: list[tuple[str, float]] = getattr(report, "cpu_fixtures", [])
        spent = float(getattr(report, "cpu_seconds", 0.0)) - sum(seconds for _, seconds in fixtures)
        self._tests[report.nodeid] = self._tests.get(report.nodeid, 0.0) + spent
        for name, seconds in fixtures:
            self._totals[name] = self._totals.get(name, 0.0) + seconds
            self._write(fixture=name, seconds=seconds)
        if report.when == "teardown":
            self._write(test=report.nodeid, seconds=round(self._tests[report.nodeid], 3))

    def _write(self, **figures: object) -> None:
        if self._record is not None:
            with self._record.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(figures) + "\n")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for what, figures in (("tests", self._tests), ("shared fixtures", self._totals)):
            ordered = sorted(figures.items(), key=lambda one: -one[1])
            total = sum(figures.values())
            terminalreporter.section(f"CPU seconds of {what}, children included: {total:.0f}")
            for name, seconds in ordered[: self._shown or None]:
                terminalreporter.write_line(f"{seconds:8.2f}  {name}")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu-durations", type=int, metavar="N", help="show the N tests that cost most CPU time (0: all)")
    parser.addoption("--cpu-record", type=Path, metavar="FILE", help="write the CPU time of every test as JSON")


def pytest_configure(config: pytest.Config) -> None:
    shown = config.getoption("--cpu-durations")
    record = config.getoption("--cpu-record")
    if shown is not None or record is not None:
        config.pluginmanager.register(CpuDurations(10 if shown is None else shown, record), "cpu-durations-report")
