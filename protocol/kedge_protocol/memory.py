"""Reads the memory of this machine and of its processes, by proc(5)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")


class DeviceMemory(NamedTuple):
    """The memory of a device in bytes."""

    total: int
    available: int


def of_device(proc: Path = PROC) -> DeviceMemory:
    """Return the memory of the device (proc_meminfo(5): ``MemTotal``, ``MemAvailable``); zeros if it cannot be read."""
    found = {"MemTotal": 0, "MemAvailable": 0}
    try:
        for line in (proc / "meminfo").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name in found:
                found[name] = int(value.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return DeviceMemory(0, 0)
    return DeviceMemory(found["MemTotal"], found["MemAvailable"])


def physical() -> int:
    """Return the physical memory that the system may use, in bytes, by sysconf(3)."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def resident(pid: int | None = None, proc: Path = PROC) -> int | None:
    """Return a process's resident memory in bytes, or None if the process is gone.

    Args:
        pid: None for this process.
    """
    try:
        pages = int((proc / str(pid or "self") / "statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
