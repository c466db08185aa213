"""Worker task: compares the ways of running a bundle's calls on this device, and keeps the best one as its plan.

A way is judged by the geometric mean of two times: of a call of a single caller, and per call with as many callers as
it serves at once. With twice the threads a call must take less than 1/√2 of the time to be worth it. Of two that differ
by less than a tenth, the one that keeps fewer cores busy is taken.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol import digest, golden, memory, tensors
from kedge_protocol.bundle.config import BundleConfig, TensorSpec
from kedge_protocol.errors import KedgeError, TargetError
from kedge_targets import proof, registry
from kedge_targets import target as targets
from kedge_targets.calls import plan as plans
from kedge_targets.calls.decoder_tuning import DecoderTuning
from kedge_targets.calls.plan import LEAST_GAIN, CallPlan, Gathered, Measured, TuneAnswer
from kedge_targets.contract import Way
from kedge_targets.executor import Executor, can_be_gathered
from kedge_targets.worker import environment
from kedge_targets.worker.progress import Progress

log = logging.getLogger(__name__)

Array = npt.NDArray[Any]
Samples = dict[str, Array]

_SECONDS = 5.0
"""Seconds after which no other way is measured, and later no other number of gathered samples."""
_SLICE = 0.06
"""Seconds of calls that make one measurement; at least three calls, at most fifty."""
_LONG_CALL = 1.0
"""Seconds of a call that is measured once."""
_SWITCH_SECONDS = 0.001
"""Python's thread switch interval, as in the serving process."""
_LOST = 0.8
"""Part of the best gain so far below which larger numbers of samples are not tried."""
_MOST = 16
_LENGTHS = (16, 32, 64, 128, 256)
_SHORT_MS = 0.5
"""Milliseconds of a call below which it costs less than what is around it: such calls are not gathered."""
_SHARE_OF_MEMORY = 8
"""A way may take this part of the memory that is available over the first one's."""


def tune(request: proof.ProveRequest, progress: Progress) -> TuneAnswer:
    """Choose how the bundle's calls are run here, and keep it.

    Raises:
        KedgeError: the bundle cannot be read or loaded.
        OSError: the plan cannot be kept.
    """
    folder, config = Path(request.folder), proof.read_config(Path(request.config))
    if config.generation is not None and config.generation.part is not None:
        return TuneAnswer()
    digest.verify_file(folder / config.golden.file, config.golden.digest)
    cache = Path(request.cache) if request.cache else environment.cache_dir()
    runtime = registry.runtime(config.backend)
    options = {**config.runtime_options, **runtime.prepare(folder, config, cache=cache, progress=progress)}
    ways = [way for way in runtime.ways(options, plans.cores()) if not _contradicts(way, config)]
    tuning: _Tuning | DecoderTuning
    if config.generation is None:
        tuning = _Tuning(folder, config, options, progress)
    else:
        tuning = DecoderTuning(folder, config, options, progress)
    plan = tuning.chosen(ways)
    if plan is not None:
        plans.write(cache, config, plan)
    return TuneAnswer(plan=plan)


def _contradicts(way: Way, config: BundleConfig) -> bool:
    """Return whether a bundle asks for something else: an option that is not its target's usual one was set by whoever
    compiled it."""
    usual: Mapping[str, Any] = {}
    with contextlib.suppress(TargetError):
        backends = targets.find(config.target).backends
        usual = next((one.options for one in backends if one.name == config.backend), {})
    asked = {name: value for name, value in config.runtime_options.items() if value != usual.get(name, 0)}
    return any(name in asked and asked[name] != value for name, value in way.options.items())


class _Tuning:
    """The comparison for one bundle.

    Args:
        options: with which it is loaded where nothing is chosen.
    """

    def __init__(self, folder: Path, config: BundleConfig, options: Mapping[str, Any], progress: Progress) -> None:
        self._folder = folder
        self._config = config
        self._options = options
        self._progress = progress
        self._vectors = golden.load(folder / config.golden.file)
        self._ends = time.monotonic() + _SECONDS

    def chosen(self, ways: Sequence[Way]) -> CallPlan | None:
        """Return the plan; None where there is nothing to choose."""
        gathers = can_be_gathered(self._config.inputs, self._config.outputs)
        if not ways and not gathers:
            return None
        plan = CallPlan(cores=plans.cores())
        if ways:
            measured = list(self._measured(ways))
            plan = plans.chosen(
                measured, lambda one: self._holds(replace(plan, options=one.options, at_once=one.calls))
            )
        return self._gathering(plan) if gathers else plan

    def _measured(self, ways: Sequence[Way]) -> Iterator[Measured]:
        one = proof.one_call(self._folder, self._config)
        available, first = memory.of_device().available, None
        for number, way in enumerate(ways):
            self._progress("ways of running calls", number, len(ways))
            if number and time.monotonic() > self._ends:
                return
            before = memory.resident() or 0
            executor = self._executor(CallPlan(cores=0, options=dict(way.options)))
            call = functools.partial(executor, one)
            try:
                alone = _seconds(call)
                busy = _busy_seconds(call, way.calls, alone) if way.calls > 1 else alone
            finally:
                executor.close()
            grown = (memory.resident() or 0) - before
            first = grown if first is None else first
            if available and grown - first >= available // _SHARE_OF_MEMORY:
                continue
            # Short calls of several threads wait for the interpreter's lock: then one at a time is better.
            yield Measured(options=dict(way.options), calls=1, alone_ms=alone * 1000, busy_ms=alone * 1000)
            if way.calls > 1:
                yield Measured(options=dict(way.options), calls=way.calls, alone_ms=alone * 1000, busy_ms=busy * 1000)

    def _executor(self, plan: CallPlan) -> Executor:
        config = self._config
        return Executor(
            self._folder,
            backend=config.backend,
            entry=config.entry,
            options=self._options,
            inputs=config.inputs,
            outputs=config.outputs,
            plan=plan,
        )

    def _holds(self, plan: CallPlan, *, step: int | None = None) -> bool:
        """Return whether the golden vectors hold with a plan."""
        executor = self._executor(plan)
        try:
            found, _ = proof.run_vectors(self._folder, self._config, executor, lambda *_: None, step=step)
        except KedgeError as error:
            log.info("%s: %s", self._config.name, error)
            return False
        finally:
            executor.close()
        return all(one.holds for one in found)

    def _gathering(self, plan: CallPlan) -> CallPlan:
        """Return the plan with the sizes up to which calls gain by being gathered."""
        self._ends = time.monotonic() + _SECONDS
        executor = self._executor(plan)
        try:
            gathered = tuple(self._gains(executor))
        finally:
            executor.close()
        most = max((one.most for one in gathered), default=1)
        if most < 2:
            return replace(plan, gathered=gathered, reason=plan.reason or "calls do not gain by being gathered")
        if not self._holds(plan, step=most) or not self._are_apart(plan):
            reason = "calls are not gathered: a sample's answer depends on those beside it"
            return replace(plan, reason=reason)
        return replace(plan, gathered=gathered)

    def _gains(self, executor: Executor) -> Iterator[Gathered]:
        first = next(self._vectors.calls(1))
        sizes = list(_of_lengths(first, self._config.inputs))
        for number, sample in enumerate(sizes):
            self._progress("gathered calls", number, len(sizes))
            values = sum(array.size for array in sample.values())
            if time.monotonic() > self._ends:
                return
            try:
                most, gain = self._best(executor, sample)
            except KedgeError:
                return  # longer than the model takes
            yield Gathered(values=values, most=most, gain=round(gain, 3))
            if most < 2:
                return

    def _best(self, executor: Executor, sample: Samples) -> tuple[int, float]:
        """Return the number of samples by which a call gains most, and the gain: in processor time, since calls are
        gathered where there are more than the processor can do."""
        alone = functools.partial(executor.on_samples, sample)
        best = 1, 1.0
        if _seconds(alone) * 1000 < _SHORT_MS:
            return best
        count = 2
        while count <= _MOST and time.monotonic() < self._ends:
            several = {name: np.repeat(array, count, axis=0) for name, array in sample.items()}
            # In turns, so that both see the same machine.
            beside = functools.partial(executor.on_samples, several)
            gain = count * _seconds(alone, time.process_time) / _seconds(beside, time.process_time)
            if gain > best[1]:
                best = count, gain
            elif gain < _LOST * best[1]:
                break
            count *= 2
        return best if best[1] >= LEAST_GAIN else (1, best[1])

    def _are_apart(self, plan: CallPlan) -> bool:
        executor = self._executor(plan)
        try:
            return are_apart(executor, self._vectors)
        except KedgeError as error:
            log.info("%s: %s", self._config.name, error)
            return False
        finally:
            executor.close()


def are_apart(executor: Executor, vectors: golden.Golden) -> bool:
    """Return whether a sample's answer stays what it is beside another whose numbers are a hundred times as large: some
    quantized graphs take one range for the whole batch.

    Raises:
        KedgeError: the model does not take two samples.
    """
    first = {name: array[:1] for name, array in vectors.inputs.items()}
    alone = executor.on_samples(first)
    both = executor.on_samples({name: np.concatenate([array, _other(array)]) for name, array in first.items()})
    return all(golden.deviation(alone[name], both[name][:1])[0] <= vectors.tolerances[name].max_abs for name in alone)


def _other(sample: Array) -> Array:
    """Return a sample of the same shape with other numbers: larger ones, or the same in another order."""
    return sample * 100 if sample.dtype.kind == "f" else sample[..., ::-1]


def _seconds(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the seconds of a call, after one that warms up unless it takes long by itself: the first quartile, as on a
    busy machine the longer ones have waited for others."""
    begun = clock()
    call()
    if (first := clock() - begun) > _LONG_CALL:
        return first
    taken: list[float] = []
    while len(taken) < 3 or (sum(taken) < _SLICE and len(taken) < 50):
        begun = clock()
        call()
        taken.append(clock() - begun)
    return max(statistics.quantiles(taken, n=4)[0], 1e-9)


def _busy_seconds(call: Callable[[], object], callers: int, alone: float) -> float:
    """Return the seconds a call of so many callers at once: the time of all calls over their number."""
    each = int(min(max(_SLICE / max(alone, 1e-6), 2), 50))
    failed: list[BaseException] = []
    ready = threading.Barrier(callers + 1)

    def work() -> None:
        try:
            call()  # what is made for a thread of its own is made now
            ready.wait()
            for _ in range(each):
                call()
        except BaseException as error:  # noqa: BLE001 -- raised again by the caller
            failed.append(error)
            ready.abort()

    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_SECONDS)
    threads = [threading.Thread(target=work) for _ in range(callers)]
    for thread in threads:
        thread.start()
    begun = time.perf_counter()
    try:
        ready.wait()
        begun = time.perf_counter()
    except threading.BrokenBarrierError:
        pass  # the reason is raised below
    for thread in threads:
        thread.join()
    took = time.perf_counter() - begun
    sys.setswitchinterval(before)
    broken = (error for error in failed if not isinstance(error, threading.BrokenBarrierError))
    if (error := next(broken, None)) is not None:
        raise error
    return took / (each * callers)


def _of_lengths(sample: Samples, inputs: Sequence[TensorSpec]) -> Iterator[Samples]:
    """Yield a sample with its free axes in several lengths, shortest first; the sample itself where none is free."""
    axes = {
        spec.name: [axis for axis, size in enumerate(spec.shape) if size is None and axis != spec.batch_axis]
        for spec in inputs
    }
    if not any(axes.values()):
        yield sample
        return
    for length in _LENGTHS:
        made = {}
        for spec in inputs:
            array = tensors.from_batch_first(sample[spec.name], spec)
            for axis in axes[spec.name]:
                array = np.take(array, np.arange(length) % array.shape[axis], axis=axis)
            made[spec.name] = tensors.to_batch_first(array, spec)
        yield made
