"""The search's tasks in the worker (``kedge_targets.worker``), one function each. Each imports what it needs."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge.evaluation import worker_messages as compiling
from kedge.evaluation import worker_tasks as measuring
from kedge.evaluation.samples import PreprocessedSamples, Samples, preprocess
from kedge.quantization import range_explosion
from kedge.quantization.sensitivity import Sensitivity
from kedge.search.candidate import StepChoice
from kedge.search.worker_messages import (
    ChangesAnswer,
    ChangesRequest,
    ScoreAnswer,
    ScoreRequest,
    SensitivityRequest,
    ShownChange,
    StepAnswer,
    StepRequest,
)
from kedge.step import Context
from kedge_protocol.errors import KedgeError, StepError
from kedge_targets.worker import Progress

Array = npt.NDArray[Any]


def apply_step(request: StepRequest, progress: Progress) -> StepAnswer:
    """Run one step and write the graph that it makes.

    Raises:
        StepError: the step failed; the message quotes any other exception that it raised.
        ConfigError: its options are invalid.
    """
    from kedge_targets.graph import model_reader, model_writer

    step = StepChoice(use=request.use, options=request.options).made()
    samples = Samples(request.calibration)
    context = Context(
        teacher=model_reader.load(Path(request.teacher)),
        samples=PreprocessedSamples(samples, request.inputs, request.preprocess),
        labels=None if samples.label is None else np.asarray(samples.label),
        plan=request.plan,
        seed=request.seed,
        fixed_batch=request.fixed_batch,
        workdir=Path(request.workdir),
        memo=None if request.memo is None else Path(request.memo),
        checkpoints=None if request.checkpoints is None else Path(request.checkpoints),
        loss=request.loss,
        seconds=request.seconds,
        progress=progress,
    )
    began = time.perf_counter()
    given = model_reader.load(Path(request.graph))
    try:
        made = step.apply(given, context)
    except KedgeError:
        raise
    except Exception as error:  # a step may be a third party's
        raise StepError(
            f"step {request.use!r} failed: {type(error).__name__}: {error}", where=_line_of(error)
        ) from error
    seconds = time.perf_counter() - began
    made = model_reader.infer_shapes(made, where=f"after step {request.use!r}")
    range_explosion.check(model_reader.infer_shapes(given, where="graph"), made, context, where=f"step {request.use!r}")
    model_writer.save(made, Path(request.made))
    return StepAnswer(
        notes=tuple(context.notes),
        figures={name: float(value) for name, value in context.figures.items()},
        ranges=dict(context.ranges),
        layers=dict(context.layers),
        seconds=seconds,
    )


def _line_of(error: Exception) -> str:
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else "step"


def score(request: ScoreRequest, progress: Progress) -> ScoreAnswer:
    """Score a graph in float and count its bytes.

    Raises:
        ModelError: ONNX Runtime refuses the graph.
    """
    from kedge_targets.graph import model_reader, model_writer, qonnx

    folder = Path(request.folder)
    folder.mkdir(parents=True, exist_ok=True)
    graph, model = Path(request.graph), model_reader.load(Path(request.graph))
    size = graph.stat().st_size
    if qonnx.is_quantized(model):
        graph = folder / "expanded.onnx"
        model_writer.save(qonnx.expand_qonnx(model), graph)
    value, latency = measuring.score(
        compiling.ReferenceRequest(
            model=str(graph),
            inputs=request.inputs,
            outputs=request.outputs,
            data=request.data,
            preprocess=request.preprocess,
            batch=request.batch,
            folder=str(folder / "outputs"),
        ),
        request.choice,
        request.reference,
        progress,
    )
    return ScoreAnswer(value=value, size_bytes=size, latency_ms=latency)


def sensitivity(request: SensitivityRequest, progress: Progress) -> Sensitivity:
    """Measure layer sensitivity; see :func:`kedge.quantization.sensitivity.measure`."""
    from kedge.quantization.sensitivity import measure
    from kedge_targets.graph import model_reader

    samples = Samples(request.calibration)
    return measure(
        model_reader.load(Path(request.graph)),
        PreprocessedSamples(samples, request.inputs, request.preprocess),
        request.precisions,
        quantized=request.quantized,
        labels=None if samples.label is None else np.asarray(samples.label),
        choice=request.choice,
        limit_samples=request.samples,
        seconds=request.seconds,
        progress=progress,
    )


def changes(request: ChangesRequest, progress: Progress) -> ChangesAnswer:
    """Return the evaluation samples that a bundle changed most, each with the layer that changes it most."""
    from kedge.evaluation import changes as finding
    from kedge.evaluation import preview
    from kedge.evaluation.npy_files import open_array

    outputs, reference = (
        {name: open_array(Path(path), name=name, where=path) for name, path in files.items()}
        for files in (request.outputs, request.reference)
    )
    found = finding.largest({one.name: one for one in request.kinds}, outputs, reference)
    samples = Samples(request.evaluation)
    picked = [samples.picked([one.sample]) for one in found]
    layers: list[str | None] = [None] * len(found)
    note = ""
    try:
        layers = _moving(request, picked)
    except KedgeError as error:
        note = f"which layer moves a sample could not be measured: {str(error).splitlines()[0]}"
    return ChangesAnswer(
        changes=tuple(
            ShownChange(
                change=replace(one, layer=layer),
                previews=preview.of({name: array[0] for name, array in raw.items()}),
            )
            for one, raw, layer in zip(found, picked, layers, strict=True)
        ),
        note=note,
    )


def _moving(request: ChangesRequest, picked: list[dict[str, Array]]) -> list[str | None]:
    if request.precision is None or not picked:
        return [None] * len(picked)
    from kedge.quantization.layer_attribution import most_altering
    from kedge_targets.graph import model_reader

    return most_altering(
        model_reader.load(Path(request.graph)),
        PreprocessedSamples(Samples(request.calibration), request.inputs, request.preprocess),
        [preprocess(raw, request.inputs, request.preprocess) for raw in picked],
        request.precision,
        quantized=request.quantized,
        floating=request.floating,
        seconds=request.seconds,
    )
