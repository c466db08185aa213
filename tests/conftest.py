"""Which tests run."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.internal.detection import is_hypothesis_test

# No test is timed, property tests neither: the machine may be busy. They draw the same examples in each run, so that
# one that fails tells of the change and not of the draw; make campaign draws others.
settings.register_profile(
    "kedge", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True, database=None
)
settings.register_profile("explore", settings.get_profile("kedge"), derandomize=False, print_blob=True)
settings.load_profile("kedge")

pytest_plugins = [
    "tests.support.parallel",
    "tests.support.requirements",
    "tests.support.brokers",
    "tests.support.cpu_durations",
    "tests.support.distributions",
    "tests.support.slow",
]

ROOT = Path(__file__).resolve().parent.parent

_LONG = ("campaign", "zoo")
"""Long proofs, each chosen by the option of its name: ``make campaign``, ``make zoo``."""


def pytest_addoption(parser: pytest.Parser) -> None:
    for name in _LONG:
        parser.addoption(f"--{name}", action="store_true", help=f"run the tests marked {name!r}, and no others")
    parser.addoption("--device", action="store_true", help="run the tests marked 'device', and no others")


def _for_device(path: Path) -> bool:
    return path.suffix != ".py" or "pytest.mark.device" in path.read_text(encoding="utf-8")


def pytest_configure(config: pytest.Config) -> None:
    """A device's environment cannot even import the other tests: named files of theirs are left out."""
    if config.getoption("--campaign"):
        settings.load_profile("explore")
    if config.getoption("--device"):
        config.args = [one for one in config.args if _for_device(Path(one.partition("::")[0]))]
        if not config.args:
            pytest.exit("none of these tests is for a device", returncode=pytest.ExitCode.NO_TESTS_COLLECTED)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The same for files that are found."""
    return True if config.getoption("--device") and not _for_device(collection_path) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run either the chosen long proofs or all other tests; the long ones first, so that no processor waits at the end
    for another's last test. Property tests are both."""
    wanted = {name for name in _LONG if config.getoption(f"--{name}")}
    marks = [{name for name in _LONG if item.get_closest_marker(name)} for item in items]
    if "campaign" in wanted:
        for mark, item in zip(marks, items, strict=True):
            if not mark and is_hypothesis_test(getattr(item, "obj", None)):
                mark.add("campaign")
    keep = [bool(mark & wanted) if wanted else not mark for mark in marks]
    if config.getoption("--device"):
        keep = [kept and item.get_closest_marker("device") is not None for item, kept in zip(items, keep, strict=True)]
    config.hook.pytest_deselected(items=[item for item, kept in zip(items, keep, strict=True) if not kept])
    items[:] = [item for item, kept in zip(items, keep, strict=True) if kept]
    items.sort(key=lambda item: item.path.is_relative_to(ROOT / "tests" / "unit"))
