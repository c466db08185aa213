"""Reads the power of a Raspberry Pi 5 from its power-management chip.

``vcgencmd pmic_read_adc`` prints a line for each rail's current and voltage (Raspberry Pi's documentation)::

    VDD_CORE_A current(7)=1.56437000A
    VDD_CORE_V volt(15)=0.72017740V

The power is the sum over the rails that have both. What feeds USB devices and what the converters lose is not among
them, so it is less than a meter at the plug shows.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

_LINE = re.compile(r"^\s*(\S+)_([AV])\s+(?:current|volt)\(\d+\)=(-?\d+(?:\.\d+)?)[AV]\s*$", re.MULTILINE)
_CHIP = b"brcm,bcm2712"
_SECONDS = 2.0


def has_meter(root: Path = Path("/")) -> bool:
    """Return whether this device is a Raspberry Pi 5 (its device tree names the BCM2712) with ``vcgencmd``."""
    try:
        compatible = (root / "proc/device-tree/compatible").read_bytes()
    except OSError:
        return False
    return _CHIP in compatible and (root / "usr/bin/vcgencmd").is_file()


def watts(root: Path = Path("/")) -> float | None:
    """Return the power now; None if the chip cannot be read (the user needs ``/dev/vcio``, which belongs to the group
    ``video``)."""
    command = [str(root / "usr/bin/vcgencmd"), "pmic_read_adc"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return sum_of_rails(done.stdout) if done.returncode == 0 else None


def sum_of_rails(text: str) -> float | None:
    """Return the watts of what ``pmic_read_adc`` printed; None if no rail has both a current and a voltage."""
    rails: dict[str, dict[str, float]] = {}
    for name, unit, number in _LINE.findall(text):
        rails.setdefault(name, {})[unit] = float(number)
    found = [rail["A"] * rail["V"] for rail in rails.values() if len(rail) == len("AV")]
    return sum(found) if found else None
