"""Worker task: makes a bundle's golden vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge.evaluation import golden as choosing
from kedge.evaluation import golden_size, worker_tasks
from kedge.evaluation.golden_size import Form
from kedge.evaluation.samples import Samples
from kedge.evaluation.worker_messages import GoldenAnswer, GoldenRequest
from kedge_protocol import golden
from kedge_protocol.bundle.config import TensorSpec
from kedge_protocol.drift import Stream
from kedge_protocol.golden_coding import CodedInput, checksums
from kedge_targets import drift, free_lengths, registry
from kedge_targets.executor import Executor
from kedge_targets.worker import Progress

Array = npt.NDArray[Any]

DRIFT_SAMPLES = 200
"""Samples of the drift baseline at most, evenly spaced."""


def make_golden(request: GoldenRequest, progress: Progress) -> GoldenAnswer:
    """Choose golden vectors within the size limit and measure their tolerances. The expected outputs are those of the
    first kernel set.

    Raises:
        VerificationError: a kernel set refuses the file.
        StorageError: no space for them.
    """
    samples = Samples(request.data)
    sets = registry.runtime(request.program.backend).kernel_sets_for(request.program.options)
    specs = request.program.outputs
    executors = [request.program.open(name) for name in sets]
    try:
        first = samples.picked([0])
        answer = executors[0].on_samples(first)
        outputs = [answer[spec.name] for spec in specs]
        form = golden_size.form(first, outputs, specs, most=request.budget)
        wanted = golden_size.candidates(first, outputs, choosing.CANDIDATES, form.samples)
        raw, own = samples.filled(choosing.candidates(samples.count, wanted))
        coded = form.coded(raw)
        raw = {**raw, **{name: one.decoded() for name, one in coded.items()}}
        given = golden.Golden(raw, {}, {}, own=own)
        runs = _runs(executors, given, specs, request.batch, progress)
        picked = choosing.choose(runs, specs, eight_bits=request.eight_bits, wanted=form.samples)
        chosen = given.picked(picked)
        _as_the_device(executors, runs, picked, chosen)
        seen = _drift(request, executors[0], samples, progress)
    finally:
        for executor in executors:
            executor.close()
    made = _written(request, form, runs, picked, chosen, {name: one.rows(picked) for name, one in coded.items()})
    return replace(made, drift=seen)


def _runs(
    executors: Sequence[Executor],
    given: golden.Golden,
    specs: Sequence[TensorSpec],
    batch: int,
    progress: Progress,
) -> list[dict[str, Array]]:
    """Return each kernel set's outputs for all candidates."""
    runs = []
    for number, executor in enumerate(executors):
        parts = [executor.on_samples(one) for one in given.calls(batch)]
        runs.append({spec.name: free_lengths.stacked([part[spec.name] for part in parts]) for spec in specs})
        progress("golden", number + 1, len(executors))
    return runs


def _drift(request: GoldenRequest, executor: Executor, samples: Samples, progress: Progress) -> tuple[Stream, ...]:
    """Return the distribution of the evaluation samples and the answers to them, for the device to compare with."""
    seen = drift.Baseline(request.program.inputs, request.program.outputs)
    rows = choosing.candidates(samples.count, DRIFT_SAMPLES)
    for start in range(0, len(rows), request.batch):
        given, own = samples.filled(rows[start : start + request.batch])
        for raw in golden.Golden(given, {}, {}, own=own).calls(request.batch):
            seen.add(raw, executor.on_samples(raw))
        progress("drift baseline", min(start + request.batch, len(rows)), len(rows))
    return seen.streams()


def _as_the_device(
    executors: Sequence[Executor], runs: Sequence[dict[str, Array]], picked: Sequence[int], chosen: golden.Golden
) -> None:
    """Run them again as the device does (kedge_targets.proof): one sample per call."""
    for run, executor in zip(runs, executors, strict=True):
        for given, position in zip(chosen.calls(1), picked, strict=True):
            for name, value in executor.on_samples(given).items():
                run[name][position] = free_lengths.filled(value, run[name].shape[1:])[0]


def _written(
    request: GoldenRequest,
    form: Form,
    runs: Sequence[dict[str, Array]],
    picked: Sequence[int],
    chosen: golden.Golden,
    coded: dict[str, CodedInput],
) -> GoldenAnswer:
    specs = request.program.outputs
    shapes = {name: runs[0][name].shape[1:] for name in form.checksums}
    summed = [
        {name: checksums(run[name], form.checksums[name]) if name in shapes else run[name] for name in run}
        for run in runs
    ]
    runtime = registry.runtime(request.program.backend)
    if runtime.exact:
        allowed = {spec.name: golden.Tolerance(0.0, 0.0) for spec in specs}
    else:
        allowed = choosing.tolerances(summed, picked, specs, eight_bits=request.eight_bits)
    expected = {name: np.ascontiguousarray(value[picked]) for name, value in summed[0].items()}
    with worker_tasks.on_disk():
        golden.save(golden.Golden(chosen.inputs, expected, allowed, coded, shapes, chosen.own), Path(request.file))
    return GoldenAnswer(
        samples=len(picked),
        kernel_sets=tuple(runtime.kernel_sets_for(request.program.options)),
        tolerances={name: [t.max_abs, t.rms] for name, t in allowed.items()},
        form=form.words,
    )
