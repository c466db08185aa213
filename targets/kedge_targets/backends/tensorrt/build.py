"""The worker's tasks: building one engine, and measuring it. Everything that may hang, crash or exhaust the memory is
done here."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

from kedge_protocol.bundle.config import BundleConfig
from kedge_protocol.errors import VerificationError
from kedge_targets.backends.tensorrt import api, cuda, device, recipe
from kedge_targets.backends.tensorrt.cache import Cache
from kedge_targets.worker.progress import Progress

BUILD = f"{__name__}:build"
MEASURE = f"{__name__}:measure"

_WARM_CALLS = 10
_TIMED_CALLS = 100
_TIMED_SECONDS = 1.0
_SHARE_OF_FREE = 0.5
"""Largest share of the GPU's free memory that one layer may use, whatever the recipe allows."""


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """A request to build one engine.

    Attributes:
        entry: path of the recipe; the graphs lie beside it.
        kernel_set: kernel set, which determines the graph.
        name: name to keep it under; given by the parent, so that both mean the same device.
        cache: the cache's folder.
    """

    entry: str
    kernel_set: str
    name: str
    cache: str


@dataclass(frozen=True, kw_only=True)
class BuildAnswer:
    """The result of a build: the engine's size, and how long it took."""

    engine_bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class MeasureRequest:
    """A request to measure one cached engine, run as the bundle's model.

    Attributes:
        folder: folder with the bundle's files by title.
        config: the bundle's configuration.
        kernel_set: kernel set of the engine.
        cache: folder as given to :meth:`Runtime.prepare`.
    """

    folder: str
    config: BundleConfig
    kernel_set: str
    cache: str


@dataclass(frozen=True, kw_only=True)
class MeasureAnswer:
    """The result of a measurement.

    Attributes:
        milliseconds: median time of one call, including pre- and postprocessing.
        holds: whether the golden vectors pass.
        reason: why not; empty if they pass.
    """

    milliseconds: float
    holds: bool
    reason: str


def build(request: BuildRequest, progress: Progress) -> BuildAnswer:
    """Build one engine and keep it in the cache.

    Raises:
        MissingDependencyError: there is no TensorRT or no GPU here, or the recipe does not cover this TensorRT.
        UnsupportedOperatorError: the parser refuses a node.
        VerificationError: the builder fails.
        StorageError: the engine cannot be kept.
    """
    began = time.perf_counter()
    entry = Path(request.entry)
    read = recipe.read(entry)
    tensorrt = api.load()
    line = device.line_of(read, tensorrt.version)
    order = api.Order(
        graph=entry.parent / read.files[request.kernel_set],
        network_flags=line.network_flags,
        builder_flags=line.builder_flags.get(request.kernel_set, ()),
        workspace_bytes=min(read.workspace_bytes, int(cuda.gpu().free_bytes * _SHARE_OF_FREE)),
        shapes={item.name: (item.minimum, item.optimum, item.maximum) for item in read.inputs if not item.static},
    )
    engine = tensorrt.build(order, progress)
    seconds = time.perf_counter() - began
    head = {"seconds": round(seconds, 3), "tensorrt": tensorrt.version}
    Cache(Path(request.cache)).store(request.name, head, engine)
    return BuildAnswer(engine_bytes=len(engine), seconds=seconds)


def measure(request: MeasureRequest, progress: Progress) -> MeasureAnswer:
    """Run the golden vectors with one engine, then time it.

    Raises:
        KedgeError: the engine cannot be loaded or fails.
    """
    from kedge_protocol import golden
    from kedge_targets import proof
    from kedge_targets.executor import Executor

    options = {**request.config.runtime_options, recipe.CACHE: request.cache, recipe.ONLY_ENGINES: True}
    config = replace(request.config, runtime_options=options)
    executor = Executor.of(Path(request.folder), config, kernel_set=request.kernel_set)
    try:
        found, _ = proof.run_vectors(Path(request.folder), config, executor, progress)
        try:
            golden.require(found, where=request.kernel_set)
        except VerificationError as error:
            return MeasureAnswer(milliseconds=0.0, holds=False, reason=error.what)
        sample = proof.one_call(Path(request.folder), config)
        for _ in range(_WARM_CALLS):
            executor(sample)
        taken: list[float] = []
        until = time.perf_counter() + _TIMED_SECONDS
        while len(taken) < _TIMED_CALLS and time.perf_counter() < until:
            at = time.perf_counter()
            executor(sample)
            taken.append((time.perf_counter() - at) * 1000)
    finally:
        executor.close()
    return MeasureAnswer(milliseconds=round(statistics.median(taken), 4), holds=True, reason="")
