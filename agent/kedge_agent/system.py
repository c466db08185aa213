"""Reads facts and figures of the device from ``/proc`` and ``/sys``."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from pathlib import Path

from kedge_protocol import memory

THERMAL = Path("/sys/class/thermal")


class CpuMeter:
    """Measures the share of the device's CPU time in use between two calls."""

    def __init__(self, proc: Path = memory.PROC) -> None:
        self._stat = proc / "stat"
        self._last = self._read()

    def percent(self) -> float:
        """Return the CPU use since the last call, 0..100 (proc_stat(5): everything but ``idle`` and ``iowait``)."""
        busy, total = self._read()
        was_busy, was_total = self._last
        self._last = busy, total
        if total <= was_total:
            return 0.0
        return round(100.0 * max(0, busy - was_busy) / (total - was_total), 1)

    def _read(self) -> tuple[int, int]:
        try:
            with self._stat.open(encoding="ascii") as file:
                values = [int(value) for value in file.readline().split()[1:9]]
        except (OSError, ValueError):
            return 0, 0
        idle = sum(values[3:5])
        return sum(values) - idle, sum(values)


def temperature(thermal: Path = THERMAL) -> float | None:
    """Return the temperature of the hottest thermal zone in degrees Celsius; None if there is none."""
    found = []
    for path in thermal.glob("thermal_zone*/temp"):
        try:
            found.append(int(path.read_text(encoding="ascii")) / 1000)
        except (OSError, ValueError):
            continue
    # A zone without a sensor reads as 0 or far below.
    plausible = [value for value in found if 0 < value < 150]
    return round(max(plausible), 1) if plausible else None


def resident_bytes(pids: Iterable[int], proc: Path = memory.PROC) -> int:
    """Return the summed resident memory of processes; ended ones count as zero."""
    return sum(memory.resident(pid, proc) or 0 for pid in pids)


def architecture() -> str:
    """Return the processor's architecture as in target files."""
    return platform.machine()
