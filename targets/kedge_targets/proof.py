"""Worker task: runs a bundle's golden vectors, on the host and on the device alike."""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedge_protocol import digest
from kedge_protocol.bundle.config import BundleConfig
from kedge_protocol.bundle.layout import parse_config
from kedge_protocol.errors import StorageError, VerificationError
from kedge_targets.pipeline.others import Neighbour
from kedge_targets.worker import environment
from kedge_targets.worker.progress import Progress

if TYPE_CHECKING:
    from kedge_protocol import golden
    from kedge_targets.executor import Executor

PROVE = "kedge_targets.proof:prove"
PREPARE = "kedge_targets.proof:prepare"
"""The tasks' names for :meth:`kedge_targets.worker.Worker.call`."""


_TIMED_CALLS = 100
_TIMED_SECONDS = 2.0
_DECODED = 12
"""Tokens of a language model that are timed one by one."""


@dataclass(frozen=True, kw_only=True)
class ProveRequest:
    """A request to prove a bundle.

    Attributes:
        folder: holds the bundle's files by title.
        config: path of the configuration blob as it was received.
        kernel_set: one of the runtime's; None for its own choice.
        cache: folder of what backends build on this device; None for ``KEDGE_CACHE`` or the user's own.
        others: the bundles to which its pipeline goes on, by model, as far as they are on this device.
    """

    folder: str
    config: str
    kernel_set: str | None = None
    cache: str | None = None
    others: dict[str, Neighbour] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PrepareAnswer:
    """The result of the preparation: runtime options that override the bundle's."""

    options: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class OutputDeviation:
    """How far one output is from its golden vectors, in the output's own unit, and how far it may be."""

    output: str
    max_abs: float
    rms: float
    allowed_max_abs: float
    allowed_rms: float
    holds: bool


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The latency of sequential calls on the golden samples.

    Attributes:
        p50_ms, p95_ms: milliseconds, what the application's samples need before and after (preprocessing,
            quantization) included.
        calls: how many were timed.
    """

    p50_ms: float
    p95_ms: float
    calls: int


@dataclass(frozen=True, kw_only=True)
class ProveAnswer:
    """The measurements of a proof.

    Attributes:
        holds: every output lies within its tolerance.
        reason: why not, in words; empty where it holds.
        samples: golden vectors run.
        seconds_p50: median seconds of one call, of one sample where the batch is free.
        runtime, runtime_version: the installed distribution that ran it.
        detail: what really ran it, in words, where the distribution's name does not say it all.
        peak_memory_bytes: the process's peak resident memory while loading and running (VmHWM).
        timing: of a bundle whose vectors hold.
    """

    deviations: tuple[OutputDeviation, ...]
    holds: bool
    reason: str
    samples: int
    seconds_p50: float
    runtime: str
    runtime_version: str
    peak_memory_bytes: int
    detail: str = ""
    timing: Timing | None = None


def prepare(request: ProveRequest, progress: Progress) -> PrepareAnswer:
    """Let the backend build and measure what it must on this device. It may take long, so it has a deadline of its own;
    :func:`prove` afterwards finds the outcome.

    Raises:
        BundleError: the configuration cannot be read.
    """
    from kedge_targets import registry

    config = read_config(Path(request.config))
    folder = Path(request.folder)
    digest.verify_file(folder / config.golden.file, config.golden.digest)
    cache = Path(request.cache) if request.cache else environment.cache_dir()
    made = registry.runtime(config.backend).prepare(folder, config, cache=cache, progress=progress)
    return PrepareAnswer(options=dict(made))


def prove(request: ProveRequest, progress: Progress) -> ProveAnswer:
    """Run all golden vectors and compare. Vectors that do not hold are an answer, not an error.

    Raises:
        BundleError: the configuration or the golden vectors cannot be read, or are not those of the bundle.
        MissingDependencyError: no runtime is installed.
        VerificationError: the runtime refuses the file, with its own reason.
    """
    import numpy as np

    folder = Path(request.folder)
    config = read_config(Path(request.config))
    digest.verify_file(folder / config.golden.file, config.golden.digest)
    _reset_peak()
    measured = _measuring(config)(request, folder, config, progress)
    runtime, version = _runtime(config)
    return ProveAnswer(
        deviations=tuple(
            OutputDeviation(
                output=d.output,
                max_abs=d.max_abs,
                rms=d.rms,
                allowed_max_abs=d.tolerance.max_abs,
                allowed_rms=d.tolerance.rms,
                holds=d.holds,
            )
            for d in measured.found
        ),
        holds=all(d.holds for d in measured.found) and not measured.wrong,
        reason=measured.wrong
        or _reason(measured.found, where=f"{config.name} {config.version} on {runtime} {version}"),
        samples=config.golden.samples,
        seconds_p50=float(np.median(measured.seconds)),
        runtime=runtime,
        runtime_version=version,
        peak_memory_bytes=measured.peak,
        detail=measured.detail,
        timing=measured.timing,
    )


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """The measurements from running the vectors."""

    found: list[golden.Deviation]
    seconds: list[float]
    peak: int
    detail: str = ""
    timing: Timing | None = None
    wrong: str = ""


def _measuring(config: BundleConfig) -> Callable[[ProveRequest, Path, BundleConfig, Progress], _Measured]:
    if config.generation is None:
        return _of_tensors
    return _of_decoder if config.generation.part is None else _of_stage


def _of_tensors(request: ProveRequest, folder: Path, config: BundleConfig, progress: Progress) -> _Measured:
    from kedge_targets.executor import Executor

    cache = Path(request.cache) if request.cache else None
    executor = Executor.of(folder, config, kernel_set=request.kernel_set, cache=cache, progress=progress)
    try:
        found, seconds = run_vectors(folder, config, executor, progress)
        peak = _peak()
        holds = all(d.holds for d in found)
        wrong, left_out = _examples(folder, config, executor, request.others) if holds else ("", "")
        timing = _timed(folder, config, executor, seconds) if holds and not wrong else None
        return _Measured(
            found=found,
            seconds=seconds,
            peak=peak,
            detail="; ".join(filter(None, (executor.detail, left_out))),
            timing=timing,
            wrong=wrong,
        )
    finally:
        executor.close()


def _of_decoder(request: ProveRequest, folder: Path, config: BundleConfig, progress: Progress) -> _Measured:
    """A language model's vectors; what is timed is one token after another."""
    import numpy as np

    from kedge_protocol import golden
    from kedge_targets import registry
    from kedge_targets.calls import plan as plans
    from kedge_targets.decoder import golden as decoders

    vectors = golden.load(folder / config.golden.file)
    tokens, columns, sources = decoders.inputs(vectors, where=config.golden.file)
    progress("golden vectors", 0, len(tokens))
    cache = Path(request.cache) if request.cache and request.kernel_set is None else None
    session = registry.runtime(config.backend).load_decoder(
        folder / config.entry,
        plans.options(plans.read(cache, config), config),
        slots=1,
        context=tokens.shape[1] + _DECODED,
        kernel_set=request.kernel_set,
    )
    try:
        found = golden.compare(vectors, decoders.answers(session, tokens, columns, sources))
        session.extend(0, tokens[0].tolist())
        seconds = []
        for token in itertools.islice(itertools.cycle(tokens[0].tolist()), _DECODED):
            begun = time.perf_counter()
            session.step({0: token})
            seconds.append(time.perf_counter() - begun)
        p50, p95 = np.percentile(seconds[1:], (50, 95)) * 1000
        timing = Timing(p50_ms=float(p50), p95_ms=float(p95), calls=len(seconds) - 1)
        return _Measured(found=found, seconds=seconds, peak=_peak(), detail=session.detail, timing=timing)
    finally:
        session.close()


def _of_stage(request: ProveRequest, folder: Path, config: BundleConfig, progress: Progress) -> _Measured:
    """The vectors of some of a language model's layers, on this device alone."""
    import numpy as np

    from kedge_protocol import golden
    from kedge_targets import registry
    from kedge_targets.decoder import golden as decoders

    vectors = golden.load(folder / config.golden.file)
    given = decoders.stage_inputs(vectors, where=config.golden.file)
    values = given["values"]
    progress("golden vectors", 0, len(values))
    runtime = registry.runtime(config.backend)
    load = runtime.load_stage(folder / config.entry, config.runtime_options, kernel_set=request.kernel_set)
    stage = load(1, values.shape[1])
    try:
        found = golden.compare(vectors, decoders.stage_answers(stage, given))
        seconds = []
        for at in range(values.shape[1]):
            begun = time.perf_counter()
            stage.run(0, values[:1, at : at + 1], np.array([at]), 1)
            seconds.append(time.perf_counter() - begun)
        p50, p95 = np.percentile(seconds[1:], (50, 95)) * 1000
        timing = Timing(p50_ms=float(p50), p95_ms=float(p95), calls=len(seconds) - 1)
        return _Measured(found=found, seconds=seconds, peak=_peak(), timing=timing)
    finally:
        stage.close()


def run_vectors(
    folder: Path, config: BundleConfig, executor: Executor, progress: Progress, *, step: int | None = None
) -> tuple[list[golden.Deviation], list[float]]:
    """Run a bundle's golden vectors in an executor; see :func:`run_vectors_through`."""
    return run_vectors_through(folder, config, executor.on_samples, progress, step=step)


def run_vectors_through(
    folder: Path,
    config: BundleConfig,
    answer: Callable[[dict[str, Any]], Mapping[str, Any]],
    progress: Progress,
    *,
    step: int | None = None,
) -> tuple[list[golden.Deviation], list[float]]:
    """Run a bundle's golden vectors through whatever answers samples.

    Args:
        step: samples a call, where the file takes any number; one by default.
        answer: input name → samples along the first axis, to output name → answers along the first axis.

    Returns:
        What was measured of each output, and the seconds of each call.

    Raises:
        BundleError: the vectors cannot be read.
        VerificationError: an output has another shape.
    """
    from kedge_protocol import golden
    from kedge_targets import free_lengths

    vectors = golden.load(folder / config.golden.file)
    step = step or _batch(config)
    rows, seconds = [], []
    done = 0
    for one in vectors.calls(step):
        begun = time.perf_counter()
        rows.append(answer(one))
        seconds.append(time.perf_counter() - begun)
        done += len(next(iter(one.values())))
        progress("golden vectors", done, vectors.samples)
    actual = {name: free_lengths.stacked([row[name] for row in rows]) for name in rows[0]}
    for spec in config.outputs:
        if spec.name not in vectors.shapes and (not spec.batched or None in spec.shape[1:]):
            pair = free_lengths.aligned(actual[spec.name], vectors.outputs[spec.name])
            actual[spec.name], vectors.outputs[spec.name] = pair
    return golden.compare(vectors, actual), seconds


def _examples(
    folder: Path, config: BundleConfig, executor: Executor, others: Mapping[str, Neighbour]
) -> tuple[str, str]:
    """Run the examples of a bundle with a pipeline; return why they fail and which were left out, or empty texts."""
    if config.pipeline is None:
        return "", ""
    from kedge_targets.pipeline import examples
    from kedge_targets.pipeline.execution import Runner
    from kedge_targets.pipeline.neighbours import Neighbours

    runner = Runner.of(folder, config)
    if runner is None:
        return "", ""
    neighbours = Neighbours(others, read_config)
    try:
        return examples.failure(folder, runner, executor, neighbours), examples.left_out(folder, neighbours)
    finally:
        neighbours.close()


def _timed(folder: Path, config: BundleConfig, executor: Executor, before: list[float]) -> Timing:
    """Time calls on the golden samples. What the vectors themselves took counts, but for the first call, which warms
    up; only what is fast is called more often, so that a slow model's proof takes no longer for it."""
    import numpy as np

    from kedge_protocol import golden

    vectors = golden.load(folder / config.golden.file)
    step = _batch(config)
    # A last piece that is not full would be another call.
    calls = list(itertools.islice(vectors.calls(step), max(1, vectors.samples // step)))
    seconds = before[1:] or before
    for one in itertools.cycle(calls):
        if len(seconds) >= _TIMED_CALLS or sum(seconds) >= _TIMED_SECONDS:
            break
        begun = time.perf_counter()
        executor.on_samples(one)
        seconds.append(time.perf_counter() - begun)
    p50, p95 = np.percentile(seconds, (50, 95)) * 1000
    return Timing(p50_ms=float(p50), p95_ms=float(p95), calls=len(seconds))


def one_call(folder: Path, config: BundleConfig) -> dict[str, Any]:
    """Return the inputs of one call: the first golden vectors, as many as the file's batch takes."""
    from kedge_protocol import golden, tensors

    vectors = golden.load(folder / config.golden.file)
    specs = {spec.name: spec for spec in config.inputs}
    first = next(vectors.calls(_batch(config)))
    return {name: tensors.from_batch_first(array, specs[name]) for name, array in first.items()}


def _batch(config: BundleConfig) -> int:
    """Return the batch size of the file; 1 if it is dynamic."""
    spec = next((one for one in config.inputs if one.batched), None)
    if spec is None or not spec.batched:
        return 1
    axis = spec.batch_axis if spec.file.permutation is None else spec.file.permutation.index(spec.batch_axis)
    return spec.file.shape[axis] or 1


def read_config(path: Path) -> BundleConfig:
    """Return a bundle's configuration.

    Raises:
        StorageError, BundleError: it cannot be read.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot be read: {error.strerror}", where=str(path)) from error
    return parse_config(raw, where=str(path))


def _reason(found: list[golden.Deviation], *, where: str) -> str:
    from kedge_protocol import golden

    try:
        golden.require(found, where=where)
    except VerificationError as error:
        return str(error)
    return ""


def _runtime(config: BundleConfig) -> tuple[str, str]:
    """The first of the backend's distributions that is installed: the one its runtime takes."""
    from kedge_targets import registry

    for name in registry.runtime(config.backend).distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return name, importlib.metadata.version(name)
    return "", ""


def _reset_peak() -> None:
    """Begin a new peak; where the kernel does not let us, the peak is the process's whole life's."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0
