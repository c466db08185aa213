"""What the compiler asks of the worker: each function is one task (``kedge_targets.worker``).

Requests and answers are in :mod:`kedge.evaluation.worker_messages`. Nothing heavy is imported at the top: a task
imports what it needs.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge.evaluation import decisions, kinds, latency_race, metric, user
from kedge.evaluation import outputs as outputs_judged
from kedge.evaluation.npy_files import open_array
from kedge.evaluation.samples import NpyWriter, PreprocessedSamples, Samples, preprocess
from kedge.evaluation.worker_messages import (
    Done,
    EvaluateAnswer,
    EvaluateRequest,
    Latency,
    LowerAnswer,
    LowerRequest,
    RaceAnswer,
    RaceRequest,
    ReferenceAnswer,
    ReferenceLatencyRequest,
    ReferenceRequest,
    WarmRequest,
)
from kedge_protocol import memory
from kedge_protocol.bundle.config import TensorSpec
from kedge_protocol.errors import KedgeError, ModelError, StorageError
from kedge_targets import free_lengths, registry
from kedge_targets.contract import Compiler, Lowered
from kedge_targets.executor import Executor
from kedge_targets.graph import batch_axes, library
from kedge_targets.graph.signature import TensorInfo
from kedge_targets.true_precision import Numbers
from kedge_targets.worker import Progress

Array = npt.NDArray[Any]

_LATENCY_SECONDS = 0.5
_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


def warm(request: WarmRequest, progress: Progress) -> Done:
    """Import ahead. A failure of the backend will be met, and told, where it matters; one of the user's metric is told
    before the long work.

    Raises:
        ConfigError: the metric cannot be imported.
    """
    with contextlib.suppress(KedgeError, ImportError):
        registry.compiler(request.backend).missing()
        registry.runtime(request.backend)
    if request.metric is not None and user.is_file(request.metric):
        user.load(request.metric)
    return Done()


def reference(request: ReferenceRequest, progress: Progress) -> ReferenceAnswer:
    """Run the float model with ONNX Runtime.

    Raises:
        ModelError: ONNX Runtime refuses the model or fails in it.
        ConfigError, DatasetError: see :mod:`kedge.evaluation.metric`.
        StorageError: no space for the outputs.
    """
    began = time.perf_counter()
    samples = Samples(request.data)
    outputs = _run_float(request, samples, progress)
    opened = _opened(outputs)
    choice = _chosen(request, opened, samples)
    score = metric.score(choice, opened, opened, samples.whole, samples.label)
    runtime = library.load()
    tools = {runtime.__name__: str(runtime.__version__), "numpy": np.__version__}
    return ReferenceAnswer(
        choice=choice, score=score, outputs=outputs, tools=tools, seconds=time.perf_counter() - began
    )


def _chosen(request: ReferenceRequest, reference: Mapping[str, Array], samples: Samples) -> metric.Choice:
    """The metric, by what the outputs are."""
    import onnx

    graph = onnx.load_model(request.model, load_external_data=False)
    seen = kinds.classify_outputs(
        reference,
        graph=kinds.graph_evidence(graph),
        inputs=samples.whole,
        labels=samples.label,
        named=metric.named_output(request.metric),
        asked=request.min_agreement,
    )
    if request.min_agreement:
        decisions.check_asked(seen)
    return metric.choose(request.metric, kinds=seen, reference=reference, labels=samples.label, inputs=samples.whole)


def score(
    request: ReferenceRequest, choice: metric.Choice, wanted: Mapping[str, str], progress: Progress
) -> tuple[float, Latency]:
    """The metric of another float graph with the same inputs and outputs, and its latency.

    Args:
        wanted: the float model's outputs, as :class:`ReferenceAnswer` has them.

    Raises:
        See :func:`reference`.
    """
    samples = Samples(request.data)
    outputs, reference = _aligned(_opened(_run_float(request, samples, progress)), _opened(wanted), request.outputs)
    value = metric.score(choice, outputs, reference, samples.whole, samples.label).value
    single = ReferenceLatencyRequest(
        model=request.model, inputs=request.inputs, data=request.data, preprocess=request.preprocess
    )
    return value, reference_latency(single, progress)


def _run_float(request: ReferenceRequest, samples: Samples, progress: Progress) -> dict[str, str]:
    run = float_model(request.model)
    feeds = PreprocessedSamples(samples, request.inputs, request.preprocess)
    names = [spec.name for spec in request.outputs]

    def batches() -> Iterator[dict[str, Array]]:
        for feed in feeds.batches(request.batch):
            yield dict(zip(names, run(names, feed), strict=True))

    return _collect(batches(), names, Path(request.folder), samples, "reference", progress)


def lower(request: LowerRequest, progress: Progress) -> LowerAnswer:
    """Lower with one backend.

    Raises:
        See :meth:`kedge_targets.contract.Compiler.lower`.
    """
    total = request.calibration.samples
    feeds = PreprocessedSamples(Samples(request.calibration), request.inputs, request.preprocess)
    compiler = registry.compiler(request.backend)
    with on_disk():
        made = compiler.lower(
            Path(request.graph),
            request.plan,
            _Counted(feeds, lambda done: progress("calibrate", done, total)),
            target=request.target,
            options=request.options,
            workdir=Path(request.workdir),
        )
    given = {spec.name: spec for spec in (*request.inputs, *request.outputs)}
    counted, uncounted = _numbers(compiler, made, next(iter(feeds), {}))
    return LowerAnswer(
        files={title: str(path) for title, path in made.files.items()},
        entry=made.entry,
        inputs=tuple(_of_caller(spec, given, request) for spec in made.inputs),
        outputs=tuple(_of_caller(spec, given, request) for spec in made.outputs),
        runtimes=made.runtimes,
        verified=made.verified,
        tools=made.tools,
        runtime_options=made.runtime_options,
        seconds=made.seconds,
        notes=(*made.notes, *uncounted),
        calibration_samples=made.calibration_samples,
        estimate=made.estimate,
        precision=made.precision,
        floating=made.floating,
        numbers=counted,
    )


def _numbers(compiler: Compiler, made: Lowered, sample: Mapping[str, Array]) -> tuple[Numbers | None, tuple[str, ...]]:
    """What the files' numbers are, or a note on why nobody knows: a model is not lost for that."""
    shapes = {spec.file.name: np.shape(sample[spec.name]) for spec in made.inputs if spec.name in sample}
    try:
        return compiler.numbers(made.files, shapes), ()
    except Exception as error:  # noqa: BLE001 -- what the vendors' readers raise has no common base
        return None, (f"the shares of integers could not be counted: {_first_line(error)}",)


def evaluate(request: EvaluateRequest, progress: Progress) -> EvaluateAnswer:
    """Run the packed files over the whole evaluation set with the device's runtime.

    Raises:
        VerificationError: the runtime refuses the file.
        ConfigError: the user's metric fails.
        StorageError: no space for the outputs.
    """
    began = time.perf_counter()
    samples = Samples(request.data)
    before = memory.resident() or 0
    executor = request.program.open()
    try:
        executor.on_samples(samples.rows(0, 1))
        grown = max(0, (memory.resident() or 0) - before)
        batches = _answers(request, executor, samples)
        names = [spec.name for spec in request.program.outputs]
        outputs = _collect(batches, names, Path(request.folder), samples, "evaluate", progress)
    finally:
        executor.close()
    opened, wanted = _aligned(_opened(outputs), _opened(request.reference), request.program.outputs)
    return EvaluateAnswer(
        score=metric.score(request.choice, opened, wanted, samples.whole, samples.label),
        agreement=decisions.agreement(request.choice.seen, opened, wanted),
        outputs=outputs_judged.judge(request.choice.seen, opened, wanted),
        memory_bytes=grown,
        seconds=time.perf_counter() - began,
        runtime=_runtime_version(request.program.backend),
        files=outputs,
    )


def _answers(request: EvaluateRequest, executor: Executor, samples: Samples) -> Iterator[dict[str, Array]]:
    """Batch by batch; step by step where a state is carried, which begins with what the float model begins with."""
    steps = request.data.steps
    if steps is None:
        for start, stop in samples.parts(request.batch):
            yield executor.on_samples(samples.rows(start, stop))
        return
    answer: dict[str, Array] = {}
    for at in range(samples.count):
        feed = samples.rows(at, at + 1)
        if at % steps:
            feed |= {name: answer[output] for name, output in request.states.items()}
        answer = executor.on_samples(feed)
        yield answer


def race(request: RaceRequest, progress: Progress) -> RaceAnswer:
    """Measure calls with one raw sample, preprocessing and quantization included, in turns with the float model."""
    sample = Samples(request.reference.data).picked([0])
    executors: list[Executor] = []
    try:
        for program in request.programs:
            executors.append(program.open())
        calls = [functools.partial(executor.on_samples, sample) for executor in executors]
        turns = latency_race.race([_float_call(request.reference), *calls], seconds=request.seconds)
    finally:
        for executor in executors:
            executor.close()
    return RaceAnswer(
        latencies=tuple(one.latency for one in turns[1:]), paces=tuple(one.pace(turns[0]) for one in turns[1:])
    )


def reference_latency(request: ReferenceLatencyRequest, progress: Progress) -> Latency:
    """Measure the float model alone, with ONNX Runtime."""
    (turns,) = latency_race.race([_float_call(request)], seconds=_LATENCY_SECONDS)
    return turns.latency


def _float_call(request: ReferenceLatencyRequest) -> Callable[[], object]:
    raw = Samples(request.data).picked([0])
    run = float_model(request.model)
    return lambda: run(None, preprocess(raw, request.inputs, request.preprocess))


class _Counted:
    """A calibration that tells how many of its samples were taken."""

    def __init__(self, inner: PreprocessedSamples, on_progress: Callable[[int], None]) -> None:
        self._inner = inner
        self._on_progress = on_progress

    @property
    def samples(self) -> int:
        return self._inner.samples

    def __iter__(self) -> Iterator[dict[str, Array]]:
        for number, item in enumerate(self._inner, start=1):
            yield item
            self._on_progress(number)


def float_model(model: str) -> Callable[[list[str] | None, Mapping[str, Array]], list[Array]]:
    onnxruntime = library.load()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ModelError(f"ONNX Runtime refuses it: {_first_line(error)}", where=Path(model).name) from error

    def run(names: list[str] | None, feed: Mapping[str, Array]) -> list[Array]:
        try:
            results: list[Array] = session.run(names, dict(feed))
        except Exception as error:
            raise ModelError(f"ONNX Runtime fails in it: {_first_line(error)}", where=Path(model).name) from error
        return results

    return run


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _collect(
    batches: Iterator[dict[str, Array]],
    names: Sequence[str],
    folder: Path,
    samples: Samples,
    what: str,
    progress: Progress,
) -> dict[str, str]:
    """Write outputs as they come; name → ``.npy`` file.

    Raises:
        ModelError: an output whose first axis is not the batch.
    """
    with on_disk(), contextlib.ExitStack() as stack:
        folder.mkdir(parents=True, exist_ok=True)
        total, repeated = samples.count, samples.unlike
        writers = {
            name: stack.enter_context(NpyWriter(folder / f"{at}.npy", total, repeated=repeated))
            for at, name in enumerate(names)
        }
        done = 0
        for batch in batches:
            lengths = {len(batch[name]) if batch[name].ndim else -1 for name in names}
            if len(lengths) != 1 or -1 in lengths:
                raise ModelError("an output's first axis is not the batch", remedy="Export it with a batch axis")
            for name, writer in writers.items():
                writer.add(batch[name])
            done += lengths.pop()
            progress(what, done, total)
        if done != total:
            raise ModelError(f"gave {done} outputs for {total} samples: an output's first axis is not the batch")
        return {name: str(writer.path) for name, writer in writers.items()}


def _aligned(
    outputs: Mapping[str, Array], reference: Mapping[str, Array], specs: Sequence[TensorSpec | TensorInfo]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Both with the same lengths where an output's length is free."""
    made, wanted = dict(outputs), dict(reference)
    for spec in specs:
        if not spec.batched or None in spec.shape[1:]:
            made[spec.name], wanted[spec.name] = free_lengths.aligned(outputs[spec.name], reference[spec.name])
    return made, wanted


def _opened(outputs: Mapping[str, str]) -> dict[str, Array]:
    return {name: open_array(Path(path), name=name, where=path) for name, path in outputs.items()}


def _of_caller(spec: TensorSpec, given: Mapping[str, TensorInfo], request: LowerRequest) -> TensorSpec:
    """With the user's layout, axes and preprocessing; free lengths stay free where samples differ in them, whatever
    the file has."""
    info = given[spec.name]
    shape = spec.shape
    if request.calibration.shapes:
        pairs = enumerate(zip(shape, info.shape, strict=True))
        shape = tuple(None if at and own is None else size for at, (size, own) in pairs)
    full = replace(spec, shape=shape, preprocess=request.preprocess.get(spec.name), layout=info.layout)
    return batch_axes.in_own_axes(full, info.batch_axis)


def _runtime_version(backend: str) -> str:
    from importlib import metadata

    for name in registry.runtime(backend).distributions:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return f"{name} {metadata.version(name)}"
    return backend


@contextlib.contextmanager
def on_disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageError(
                f"no space left: {error.strerror}", where="compile", remedy="Free space where OUT will be"
            ) from error
        raise
