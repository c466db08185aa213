"""The energy that this machine has used, where a sensor tells it: never an estimate from a data sheet.

Sensors: RAPL of the processor's packages (Linux ``powercap``; readable by root alone on most systems), or the power of
the whole module as a Jetson's INA3221 measures it, integrated over time.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from kedge_targets import jetson

_WHOLE = "VDD_IN"
"""The rail by which a whole module is fed."""


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
        board = jetson.look(self._root)
        milliwatts = None if board is None else board.power_mw.get(_WHOLE)
        if milliwatts is None:
            self._power = None
            return
        self._known = True
        if self._power is not None:
            before, at = self._power
            self._microjoules += int((before + milliwatts) / 2 * (now - at) * 1000)
        self._power = float(milliwatts), now

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
