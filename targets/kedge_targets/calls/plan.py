"""What was chosen for the calls of a bundle on this device, and where that is kept.

::

    CACHE/calls/HEX.json     of the bundle whose configuration has this SHA-256
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kedge_protocol import codec, files
from kedge_protocol.bundle.config import BundleConfig
from kedge_protocol.errors import KedgeError

log = logging.getLogger(__name__)

TUNE = "kedge_targets.calls.tuning:tune"
"""Name of the task that makes plans, for :meth:`kedge_targets.worker.Worker.call`."""

LEAST_GAIN = 1.1
"""Factor by which a way of running calls must be better than what is simpler."""

_FOLDER = "calls"
_KEPT = 64


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured of one way of running calls.

    Attributes:
        options: of the runtime, over the bundle's own.
        calls: number of callers while it was busy.
        alone_ms: milliseconds of a call of a single caller, first quartile.
        busy_ms: milliseconds a call with all callers at once: the time of all calls over their number.

    Of a language model ``alone_ms`` is the time of a token that is written, ``busy_ms`` that of a token that is read.
    """

    options: dict[str, Any]
    calls: int
    alone_ms: float
    busy_ms: float

    @property
    def score(self) -> float:
        """Return the geometric mean of both times, milliseconds."""
        return math.sqrt(self.alone_ms * self.busy_ms)


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """Up to which size calls are gathered into one call of the runtime.

    Attributes:
        values: numbers of one sample, all inputs together; for samples of up to so many (and of more than the one
            before in the list).
        most: samples in one call; 1 where gathering does not gain.
        gain: processor time of single calls over that of one call with ``most`` samples; the best one found if ``most``
            is 1.
    """

    values: int
    most: int
    gain: float


@dataclass(frozen=True, kw_only=True)
class CallPlan:
    """How calls of a bundle are run on this device.

    Attributes:
        cores: that the process had when it was chosen; with another number the plan is not followed.
        options: of the runtime, over the bundle's own.
        at_once: calls of the runtime that run at the same time.
        gathered: by the size of a sample, ascending; samples larger than the last are not gathered.
        measured: what was compared; the reasons for ``options``.
        reason: why nothing was chosen, or why calls are not gathered; empty if there is nothing to say.
    """

    cores: int
    options: dict[str, Any] = field(default_factory=dict)
    at_once: int = 1
    gathered: tuple[Gathered, ...] = ()
    measured: tuple[Measured, ...] = ()
    reason: str = ""

    @property
    def most(self) -> int:
        """Return the largest number of samples that are gathered into one call."""
        return max((one.most for one in self.gathered), default=1)

    @property
    def options_figures(self) -> Mapping[str, float]:
        """Return the chosen options as figures for telemetry."""
        numbers = {name: value for name, value in self.options.items() if isinstance(value, int)}
        return {f"call_{name}": float(value) for name, value in numbers.items()}

    @property
    def figures(self) -> Mapping[str, float]:
        """Return the choice as figures for telemetry."""
        return {
            **self.options_figures,
            "calls_at_once": float(self.at_once),
            "calls_gathered_most": float(self.most),
        }


@dataclass(frozen=True, kw_only=True)
class TuneAnswer:
    """The plan that is kept; None where nothing is to choose."""

    plan: CallPlan | None = None


def chosen(measured: Sequence[Measured], holds: Callable[[Measured], bool]) -> CallPlan:
    """Return the plan for the best of the ways that were measured. Of two that differ by less than :data:`LEAST_GAIN`,
    the one that keeps fewer cores busy is taken, which comes first.

    Args:
        holds: whether the golden vectors hold in this way; it is asked only of ways that would be taken.
    """
    best: Measured | None = None
    for one in measured:
        if (best is None or LEAST_GAIN * one.score < best.score) and holds(one):
            best = one
    plan = CallPlan(cores=cores(), measured=tuple(measured))
    if best is None:
        return replace(plan, reason="the golden vectors do not hold in any other way")
    return replace(plan, options=best.options, at_once=best.calls)


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def numbers_of_threads(cores: int) -> tuple[int, ...]:
    """Return the numbers of threads for one call that are worth comparing: one, half of the cores, all of them."""
    return tuple(sorted({1, max(1, cores // 2), cores}))


def read(cache: Path | None, config: BundleConfig) -> CallPlan | None:
    """Return the plan of a bundle; None if there is none that holds on this machine.

    Args:
        cache: where plans are kept; None for none.
    """
    if cache is None:
        return None
    path = _path(cache, config)
    try:
        plan = codec.decode(path.read_bytes(), CallPlan, where=str(path))
    except (OSError, KedgeError):
        return None
    return plan if plan.cores == cores() else None


def options(plan: CallPlan | None, config: BundleConfig) -> dict[str, Any]:
    """Return the runtime's options of a bundle as its plan has them, else its own."""
    return {**config.runtime_options, **({} if plan is None else plan.options)}


def write(cache: Path, config: BundleConfig, plan: CallPlan) -> None:
    """Keep the plan of a bundle, in the place of an older one.

    Raises:
        OSError: it cannot be written.
    """
    path = _path(cache, config)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, codec.encode(plan))
    others = sorted(path.parent.glob("*.json"), key=lambda one: one.stat().st_mtime)
    for old in others[:-_KEPT]:
        with contextlib.suppress(OSError):
            old.unlink()


def _path(cache: Path, config: BundleConfig) -> Path:
    return cache / _FOLDER / f"{hashlib.sha256(codec.encode(config)).hexdigest()}.json"
