"""What tests need from outside this tree: programs, packages, data.

A test whose need is not met is skipped, and says what to install; with ``CI=true`` it fails instead."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SHARED = Path(os.environ.get("KEDGE_SHARED", ROOT.parent / "shared")) / "data"
"""Models and evaluation sets that are no part of the project."""

DEBIAN = {
    "cc": "gcc",
    "mosquitto_passwd": "mosquitto",
    "qemu-aarch64": "qemu-user",
    "qemu-x86_64": "qemu-user",
    "readelf": "binutils",
    "promtool": "prometheus",
    "systemd-analyze": "systemd",
    "systemd-sysusers": "systemd",
}
"""Program → Debian package, where the names differ."""
_NO_TOOLCHAIN = re.compile(r"the toolchain '(\w+)' is not installed")


def missing(what: str, remedy: str) -> NoReturn:
    """Skip the test aloud; under CI, where nothing may be missing, fail it.

    Args:
        what: is missing.
        remedy: how to get it.
    """
    message = f"{what} is missing: {remedy}"
    if os.environ.get("CI") == "true":
        pytest.fail(message, pytrace=False)
    pytest.skip(message)


def program(name: str) -> str:
    """The path of an outside program, looked for in /usr/sbin too: Debian keeps mosquitto there, out of most users'
    ``PATH``."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    return found or missing(f"the program {name!r}", f"sudo apt-get install {DEBIAN.get(name, name)}")


def package(name: str) -> None:
    """An import package of this environment."""
    if importlib.util.find_spec(name) is None:
        missing(f"the package {name!r}", "make setup")


def _need_shared_data() -> None:
    if not SHARED.is_dir():
        missing("the shared data", "put it in ../shared/data, or set KEDGE_SHARED to the folder that holds data/")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of shared models and evaluation sets."""
    _need_shared_data()
    return SHARED


def pytest_configure(config: pytest.Config) -> None:
    """Children find by name what :func:`program` finds."""
    folders = os.environ.get("PATH", "").split(os.pathsep)
    if "/usr/sbin" not in folders:
        os.environ["PATH"] = os.pathsep.join([*folders, "/usr/sbin"])


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("shared_data"):
        _need_shared_data()
    for marker, there in (("needs", program), ("packages", package)):
        for mark in item.iter_markers(marker):
            for name in mark.args:
                there(name)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Many tests compile for several targets: one that ends for want of a toolchain is skipped like the others."""
    report = yield
    found = _NO_TOOLCHAIN.search(str(call.excinfo.value)) if report.failed and call.excinfo is not None else None
    if found is not None and os.environ.get("CI") != "true" and not _installed(found[1]):
        reason = f"the toolchain {found[1]!r} is missing: kedge toolchain install {found[1]}"
        report.outcome, report.longrepr = "skipped", (str(item.path), item.location[1] or 0, f"Skipped: {reason}")
    return report


def _installed(name: str) -> bool:
    from kedge_protocol.errors import ToolchainError
    from kedge_targets import toolchain

    try:
        toolchain.find(name)
    except ToolchainError:
        return False
    return True
