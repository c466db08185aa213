"""Fixtures of all tests: the shared data, outside programs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# No test is timed, property tests neither: the machine may be busy.
settings.register_profile("kedge", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kedge")

pytest_plugins = ["tests.support.brokers", "tests.support.distributions"]

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("KEDGE_SHARED", ROOT.parent / "shared")) / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of shared models and evaluation sets."""
    return SHARED


_LONG = ("campaign", "zoo")
"""Long proofs, each chosen by the option of its name: ``make campaign``, ``make zoo``."""


def pytest_addoption(parser: pytest.Parser) -> None:
    for name in _LONG:
        parser.addoption(f"--{name}", action="store_true", help=f"run the tests marked {name!r}, and no others")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run either the chosen long proofs or all other tests."""
    wanted = {name for name in _LONG if config.getoption(f"--{name}")}
    marks = [{name for name in _LONG if item.get_closest_marker(name)} for item in items]
    keep = [bool(mark & wanted) if wanted else not mark for mark in marks]
    config.hook.pytest_deselected(items=[item for item, kept in zip(items, keep, strict=True) if not kept])
    items[:] = [item for item, kept in zip(items, keep, strict=True) if kept]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip aloud what cannot run here. Where the shared data is, or under CI, nothing may be missing: there a skip is
    a failure."""
    if item.get_closest_marker("shared_data") and not SHARED.is_dir():
        pytest.skip("the shared data is absent (../shared/data)")
    for mark in item.iter_markers("needs"):
        for program in mark.args:
            if shutil.which(program) is None:
                message = f"the program {program!r} is not installed"
                if SHARED.is_dir():
                    pytest.fail(message)
                pytest.skip(message)
