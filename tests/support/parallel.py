"""Tests in several processes, by pytest-xdist."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

_WORKER_BYTES = 3 << 30
"""Memory that a process of tests and its children may want."""

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each takes one processor; set before torch and NumPy read it.
    for _library in ("OMP", "OPENBLAS", "MKL"):
        os.environ.setdefault(f"{_library}_NUM_THREADS", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """``-n auto``: a process for each processor that this one may use, as far as there is memory for them."""
    memory = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    available = int(memory["MemAvailable"].split()[0]) * 1024
    return max(1, min(len(os.sched_getaffinity(0)), available // _WORKER_BYTES))


def _printable(data: Any) -> Any:
    """Without lone surrogates, of which damaged file names are made: no message to another process can hold them."""
    if isinstance(data, str):
        return data.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(data, dict):
        return {key: _printable(value) for key, value in data.items()}
    return [_printable(one) for one in data] if isinstance(data, (list, tuple)) else data


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    return _printable((yield))
