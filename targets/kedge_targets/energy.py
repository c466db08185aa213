"""The energy that this machine has used, where a sensor tells it: never an estimate from a data sheet.

Sensors: RAPL of the processor's packages (Linux ``powercap``; readable by root alone on most systems); or, integrated
over time, the power of the whole module as a Jetson's INA3221 measures it, or of a Raspberry Pi 5's rails.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from kedge_targets import jetson, raspberry_pi

_WHOLE = "VDD_IN"
"""The rail by which a whole module is fed."""
_PI_PERIOD = 5.0
"""Seconds between two readings of a Raspberry Pi's chip: each starts a program."""


class EnergyMeter:
    """Sums energy up.

    Args:
        root: root of the file system with the sensors.
    """

    def __init__(self, root: Path = jetson.ROOT) -> None:
        self._root = root
        self._packages = sorted(root.glob("sys/class/powercap/intel-rapl:[0-9]"))
        self._read: dict[Path, int] = {}
        self._microjoules = 0
        self._power: tuple[float, float] | None = None
        self._known = False
        self._pi = raspberry_pi.has_meter(root)

    @property
    def joules(self) -> float | None:
        """Return the joules used since the first :meth:`sample`; None without a sensor that can be read."""
        return self._microjoules / 1e6 if self._known else None

    def sample(self, now: float) -> None:
        """Read the sensors; call it about every second.

        Args:
            now: seconds of a monotonic clock.
        """
        for package in self._packages:
            self._sample_package(package)
        if self._packages:
            return
        if self._pi and self._power is not None and now - self._power[1] < _PI_PERIOD:
            return
        milliwatts = self._milliwatts()
        if milliwatts is None:
            self._power = None
            return
        self._known = True
        if self._power is not None:
            before, at = self._power
            self._microjoules += int((before + milliwatts) / 2 * (now - at) * 1000)
        self._power = float(milliwatts), now

    def _milliwatts(self) -> float | None:
        if self._pi:
            watts = raspberry_pi.watts(self._root)
            return None if watts is None else 1000 * watts
        board = jetson.look(self._root)
        return None if board is None else board.power_mw.get(_WHOLE)

    def _sample_package(self, package: Path) -> None:
        with contextlib.suppress(OSError, ValueError):
            value = int((package / "energy_uj").read_text())
            before = self._read.get(package)
            self._read[package] = value
            self._known = True
            if before is None:
                return
            # The counter starts again at 0 beyond its range.
            span = 0 if value >= before else int((package / "max_energy_range_uj").read_text()) + 1
            self._microjoules += value + span - before


def busy_seconds(root: Path = Path("/")) -> float | None:
    """Return the time that all processors have worked (``man 5 proc``: all but idle and iowait, in hundredths)."""
    try:
        fields = [int(field) for field in (root / "proc" / "stat").read_text().splitlines()[0].split()[1:9]]
    except (OSError, ValueError, IndexError):
        return None
    return (sum(fields) - fields[3] - fields[4]) / 100


class Spending:
    """What this process spends from now on.

    Args:
        meter: reads the energy.
        root: root of the file system with ``/proc/stat``.
    """

    def __init__(self, meter: EnergyMeter | None = None, *, root: Path = Path("/")) -> None:
        self._root = root
        self._meter = EnergyMeter(root) if meter is None else meter
        self._meter.sample(time.monotonic())
        self._before = self._now()

    def so_far(self) -> tuple[float, float | None]:
        """Return this process's processor time in seconds, and its joules: of the machine's energy the part that this
        time is of all processes'; None without a sensor."""
        self._meter.sample(time.monotonic())
        (process, machine, joules), now = self._before, self._now()
        seconds = now[0] - process
        if joules is None or now[2] is None or machine is None or now[1] is None:
            return seconds, None
        busy = max(now[1] - machine, seconds)
        return seconds, (now[2] - joules) * seconds / busy if busy > 0 else None

    def _now(self) -> tuple[float, float | None, float | None]:
        return time.process_time(), busy_seconds(self._root), self._meter.joules
