"""The range of each number among the options of a compilation."""

from __future__ import annotations

import math
from collections.abc import Callable

from kedge.search.options import CompileOptions
from kedge_protocol.errors import ConfigError

_MOST_MEMORY = 1 << 40
"""MiB; bytes of it still fit what the system counts with."""


def _above_zero(value: float) -> bool:
    return value > 0


RANGES: dict[str, tuple[Callable[[float], bool], str, str]] = {
    "max_drop": (lambda value: 0 <= value < math.inf, "drop", "Give a number from 0 up"),
    "min_agreement": (lambda value: 0 <= value <= 1, "share", "Give a number from 0 to 1"),
    "confidence": (lambda value: 0.5 <= value < 1, "confidence", "Give a number from 0.5 to below 1"),
    "max_latency": (_above_zero, "time", "Give milliseconds"),
    "time_limit": (_above_zero, "time", "Give seconds"),
    "deadline": (_above_zero, "time", "Give seconds"),
    "memory_limit": (lambda value: 0 < value < _MOST_MEMORY, "memory", "Give MiB"),
    "calibration_samples": (_above_zero, "number of samples", "Give 1 or more"),
    "evaluation_samples": (_above_zero, "number of samples", "Give 8 or more"),
    "batch": (_above_zero, "batch size", "Give 1 or more"),
    "seed": (lambda value: 0 <= value < 1 << 63, "seed", "Give a whole number from 0 up"),
    "jobs": (_above_zero, "number of trials", "Give 1 or more"),
    "target_fps": (_above_zero, "rate", "Give samples a second"),
    "max_utilization": (_above_zero, "share", "Give a number above 0"),
    "max_kl": (lambda value: 0 <= value < math.inf, "divergence", "Give nats a token, from 0 up"),
    "min_tokens_per_second": (lambda value: 0 < value < math.inf, "pace", "Give tokens a second, above 0"),
    "context": (lambda value: value >= 16, "number of positions", "Give 16 or more"),
    "slots": (_above_zero, "number of sequences", "Give 1 or more"),
    "split": (lambda value: value > 1, "number of parts", "Give 2 or more devices"),
}
"""Option → whether a value is valid, what an invalid one fails to be, and what to give."""


def check(options: CompileOptions) -> None:
    """Raise :class:`ConfigError` if a number is out of its range; the message names the option."""
    for name, (holds, what, remedy) in RANGES.items():
        value = getattr(options, name)
        if value is not None and not holds(value):
            said = value if isinstance(value, int) else f"{value:g}"
            raise ConfigError(f"{said} is no {what}", where=f"--{name.replace('_', '-')}", remedy=remedy)
