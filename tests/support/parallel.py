"""Tests in several processes, by pytest-xdist."""

from __future__ import annotations

import fcntl
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TypeVar

import pytest

T = TypeVar("T")

_FOLDER = "KEDGE_TESTS_RUN"
"""Environment variable: a folder that all processes of one run share."""
_WORKER_BYTES = 3 << 30
"""Memory that a process of tests and its children may want."""

# Each process takes one processor, and what is trained is the same however many there are; set before torch and NumPy
# read it.
for _library in ("OMP", "OPENBLAS", "MKL"):
    os.environ.setdefault(f"{_library}_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        os.environ[_FOLDER] = tempfile.mkdtemp(prefix="kedge-tests-")


def pytest_unconfigure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ and _FOLDER in os.environ:
        shutil.rmtree(os.environ.pop(_FOLDER), ignore_errors=True)


def once(name: str, make: Callable[[Path], T]) -> T:
    """What the first process of this run that asks for ``name`` makes; the others wait for it.

    Args:
        name: of a folder, which lasts as long as the run.
        make: gets that folder, empty; what it returns must survive pickling.
    """
    folder = Path(os.environ[_FOLDER]) / name
    kept = folder.with_suffix(".pickle")
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            kept.write_bytes(pickle.dumps(make(folder)))
    made: T = pickle.loads(kept.read_bytes())
    return made


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """``-n auto``: as far as there is memory for them, one process more than there are processors, because many tests
    wait for children, brokers and deadlines."""
    memory = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    available = int(memory["MemAvailable"].split()[0]) * 1024
    return max(1, min(len(os.sched_getaffinity(0)) + 1, available // _WORKER_BYTES))


def _printable(data: Any) -> Any:
    """Without lone surrogates, of which damaged file names are made: no message to another process can hold them."""
    if isinstance(data, str):
        return data.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(data, dict):
        return {key: _printable(value) for key, value in data.items()}
    return type(data)(map(_printable, data)) if isinstance(data, (list, tuple)) else data


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    return _printable((yield))
