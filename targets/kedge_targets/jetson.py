"""Reads a Jetson's figures from ``/sys`` and two files of ``nvpmodel``; nothing on other devices.

Where each figure stands (JetPack 6 and 7, read by NVIDIA's own tegrastats and by jetson-stats too):

- GPU: the devfreq device whose device-tree node is named ``gpu``, ``ga10b``, …; its ``load`` is in thousandths.
- Power: the INA3221 monitors' hwmon folders: ``inN_label`` names the rail, ``inN_input`` is in mV, ``currN_input`` in
  mA (Linux' hwmon interface). Channel 7 is the chip's sum of shunt voltages, ``NC`` a channel that is not connected.
- Temperature: the thermal zones, in thousandths of a degree.
- Power mode: ``/var/lib/nvpmodel/status`` has the number, ``/etc/nvpmodel.conf`` the names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path("/")

_GPUS = ("gpu", "ga10b", "gv11b", "gp10b", "gb10b")
_SUM_OF_SHUNTS = 7


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The figures of a Jetson at one moment.

    Attributes:
        gpu_percent: load, 0..100; None where the driver does not tell.
        power_mw: rail → milliwatts.
        temperatures_c: thermal zone → degrees Celsius.
        power_mode: e.g. ``15W`` or ``MAXN``; the number where it has no name.
    """

    gpu_percent: float | None = None
    power_mw: dict[str, int] = field(default_factory=dict)
    temperatures_c: dict[str, float] = field(default_factory=dict)
    power_mode: str | None = None


def is_one(root: Path = ROOT) -> bool:
    """Return whether this device is a Jetson: its device tree names a Tegra."""
    try:
        return b"nvidia,tegra" in (root / "proc/device-tree/compatible").read_bytes()
    except OSError:
        return False


def look(root: Path = ROOT) -> Figures | None:
    """Read all figures; None on other devices. Unreadable figures are left out."""
    if not is_one(root):
        return None
    return Figures(
        gpu_percent=_gpu_percent(root),
        power_mw=_power(root),
        temperatures_c=_temperatures(root),
        power_mode=power_mode(root),
    )


def power_mode(root: Path = ROOT) -> str | None:
    """Return the power mode's name, else its number; None without nvpmodel."""
    found = re.search(r"pmode:0*(\d+)", _text(root / "var/lib/nvpmodel/status"))
    if found is None:
        return None
    # < POWER_MODEL ID=0 NAME=MAXN >
    name = re.search(rf"POWER_MODEL\s+ID={found[1]}\s+NAME=(\S+)", _text(root / "etc/nvpmodel.conf"))
    return found[1] if name is None else name[1]


def _gpu_percent(root: Path) -> float | None:
    for folder in sorted((root / "sys/class/devfreq").glob("*")):
        if _text(folder / "device/of_node/name").strip("\0\n ") in _GPUS:
            load = _number(folder / "device/load")
            if load is not None:
                return round(load / 10, 1)
    return None


def _power(root: Path) -> dict[str, int]:
    rails = {}
    for folder in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        if _text(folder / "name").strip() != "ina3221":
            continue
        for label in sorted(folder.glob("in*_label")):
            channel, name = label.name[2 : -len("_label")], _text(label).strip()
            if not channel.isdigit() or int(channel) == _SUM_OF_SHUNTS or name in ("", "NC"):
                continue
            volts, amperes = _number(folder / f"in{channel}_input"), _number(folder / f"curr{channel}_input")
            if volts is not None and amperes is not None:
                rails[name] = round(volts * amperes / 1000)
    return rails


def _temperatures(root: Path) -> dict[str, float]:
    found = {}
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        name, value = _text(zone / "type").strip(), _number(zone / "temp")
        # A part that is switched off answers with an error, or with -256 degrees.
        if name and value is not None and -100_000 < value < 150_000:
            found[name.removesuffix("-thermal")] = round(value / 1000, 1)
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    try:
        return int(_text(path).strip() or "x")
    except ValueError:
        return None
