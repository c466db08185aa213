"""The worker's task that measures what one call of a bundle costs on this host: processor time, and energy where a
sensor tells it."""

from __future__ import annotations

import time
from dataclasses import dataclass

from kedge.evaluation.dataset import Data
from kedge.evaluation.samples import Samples
from kedge.evaluation.worker_messages import Program
from kedge_targets.energy import Spending
from kedge_targets.worker import Progress

TASK = "kedge.evaluation.cost:measure"
_SECONDS = 0.2
_SECONDS_WITH_SENSOR = 2.0
_LEAST_CALLS, _MOST_CALLS = 3, 2000


@dataclass(frozen=True, kw_only=True)
class CostRequest:
    """Call a lowered model again and again with its first evaluation sample."""

    program: Program
    data: Data


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one call with one sample costs on this host.

    Attributes:
        cpu_ms: processor time of all its threads.
        joules: the part of the machine's energy (RAPL) that this time is of all processes'; None without a sensor that
            can be read.
    """

    cpu_ms: float
    joules: float | None = None


def measure(request: CostRequest, progress: Progress) -> Cost:
    """Worker task; see :class:`CostRequest`.

    Raises:
        VerificationError: the runtime refuses the file.
    """
    sample = Samples(request.data).picked([0])
    executor = request.program.open()
    try:
        executor.on_samples(sample)  # memory and kernels are ready
        spending = Spending()
        # The counters of a sensor are coarse.
        wanted = _SECONDS if spending.so_far()[1] is None else _SECONDS_WITH_SENSOR
        calls, began = 0, time.perf_counter()
        while calls < _LEAST_CALLS or (time.perf_counter() - began < wanted and calls < _MOST_CALLS):
            executor.on_samples(sample)
            calls += 1
        seconds, joules = spending.so_far()
    finally:
        executor.close()
    return Cost(cpu_ms=1000 * seconds / calls, joules=None if joules is None else joules / calls)
