"""Reads the memory of this machine and of its processes, by proc(5) and cgroups(7)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


class DeviceMemory(NamedTuple):
    """The memory of a device in bytes."""

    total: int
    available: int


class _Files(NamedTuple):
    """Names of a control group's files: its limit, its use, and the part of the use that gives way."""

    limit: str
    used: str
    given_back: str


# https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files
_SECOND = _Files("memory.max", "memory.current", "inactive_file")
# https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
_FIRST = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def of_device(proc: Path = PROC, cgroups: Path = CGROUPS) -> DeviceMemory:
    """Return the memory that this process may use: that of the device (proc_meminfo(5): ``MemTotal``,
    ``MemAvailable``), or of its container or service where that has less; zeros if the device's cannot be read."""
    found = {"MemTotal": 0, "MemAvailable": 0}
    try:
        for line in (proc / "meminfo").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name in found:
                found[name] = int(value.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return DeviceMemory(0, 0)
    total, available = found["MemTotal"], found["MemAvailable"]
    for limit, left in _limits(proc, cgroups):
        total, available = min(total, limit), min(available, left)
    return DeviceMemory(total, available)


def _limits(proc: Path, cgroups: Path) -> Iterator[tuple[int, int]]:
    """Yield limit and bytes left of each control group with a limit that this process is in."""
    try:
        lines = (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, files = (cgroups / "memory", _FIRST) if controllers else (cgroups, _SECOND)
        # A container sees its own group as the root, whatever the path says.
        group = root / path.strip("/")
        for folder in (group, *group.parents):
            if (found := _limit(folder, files)) is not None:
                yield found
            if folder == root:
                break


def _limit(folder: Path, files: _Files) -> tuple[int, int] | None:
    try:
        limit = int((folder / files.limit).read_text(encoding="ascii"))
        used = int((folder / files.used).read_text(encoding="ascii"))
        shares = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        return limit, max(0, limit - used + int(shares.get(files.given_back, 0)))
    except (OSError, ValueError):
        return None


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
