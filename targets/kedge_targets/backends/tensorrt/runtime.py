"""Turns a bundle's graphs into TensorRT engines on an NVIDIA GPU, and runs them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedge_protocol import memory
from kedge_protocol.bundle.config import BundleConfig
from kedge_protocol.errors import ConfigError, KedgeError, MissingDependencyError, StorageError
from kedge_targets import contract
from kedge_targets.backends.tensorrt import fallback, half_precision, recipe
from kedge_targets.backends.tensorrt.recipe import CACHE, FP16, INT8, ONLY_ENGINES, Recipe

if TYPE_CHECKING:
    from kedge_targets.backends.tensorrt.engine_selection import Bench
    from kedge_targets.decoder.session import DecoderSession
    from kedge_targets.worker.progress import Progress

log = logging.getLogger("kedge.tensorrt")

# Options that prepare() gives to load().
CHOSEN = "kernel_set"
REASON = "reason"

COARSE = "coarse"

_OWN = frozenset({CHOSEN, REASON, CACHE, ONLY_ENGINES})
_KNOWN_OPTIONS = frozenset({"threads", "build_seconds", "build_mib"})


class Runtime(contract.Runtime):
    """Runs models on TensorRT 8.6, 10 or 11 with cuda-python; if they cannot run the model, ONNX Runtime does, and the
    session's detail says so.

    Options:
        threads: number of ONNX Runtime's threads on the CPU; 0 lets it choose.
        build_seconds: time limit for building one engine; 0 for 1800.
        build_mib: memory that the building process may use; 0 for three quarters of the device's.
    """

    distributions = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", *fallback.DISTRIBUTIONS)

    @property
    def kernel_sets(self) -> tuple[str, ...]:
        """Return the kernel sets. ``int8``: the graph with explicit quantization. ``fp16``: the half-precision graph. A
        device measures both and uses the faster, so a bundle's tolerances must hold for both; a bundle without an int8
        graph has one graph under both names. ``coarse``: never requested from a device; the half-precision graph with
        its products rounded, for which tolerances must leave room (see :mod:`.half_precision`)."""
        return (INT8, FP16, COARSE)

    def prepare(self, folder: Path, config: BundleConfig, *, cache: Path, progress: Progress) -> Mapping[str, Any]:
        """Build the missing engines, measure them, and choose one. Does nothing without TensorRT."""
        from kedge_targets.backends.tensorrt import device, engine_selection

        if config.generation is not None:
            return {}
        entry = folder / config.entry
        options = config.runtime_options
        if device.missing() is not None:
            return {}
        try:
            bench = _bench(entry, recipe.read(entry), options, cache)
            chosen = engine_selection.choose(bench, folder, config, progress)
        except (StorageError, MissingDependencyError) as error:
            return {REASON: error.what}
        return {CHOSEN: chosen["kernel_set"], REASON: chosen["reason"], CACHE: str(cache)}

    def load(self, entry: Path, options: Mapping[str, Any], *, kernel_set: str | None = None) -> contract.Session:
        """See :meth:`kedge_targets.contract.Runtime.load`. Without a preceding :meth:`prepare`, a missing engine is
        built here."""
        _check(options, kernel_set)
        read = recipe.read(entry)
        reason = options.get(REASON, "")
        wanted = kernel_set or options.get(CHOSEN)
        if wanted != COARSE and (wanted is not None or not reason):
            try:
                return self._engine(entry, read, _offered(read, wanted), options)
            except KedgeError as error:
                if options.get(ONLY_ENGINES):
                    raise
                reason = error.what
        return self._fall_back(entry, read, wanted, options, reason)

    def load_decoder(
        self, entry: Path, options: Mapping[str, Any], *, slots: int, context: int, kernel_set: str | None = None
    ) -> DecoderSession:
        """See :meth:`kedge_targets.contract.Runtime.load_decoder`. ONNX Runtime runs it, by its CUDA provider where
        there is one; ``coarse`` computes in float32, so that tolerances leave room for a GPU's own rounding."""
        from kedge_targets.backends.tensorrt.decoder import loading

        _check(options, kernel_set)
        threads = int(options.get("threads", 0))
        return loading.opened(entry, threads=threads, slots=slots, context=context, single=kernel_set == COARSE)

    def _engine(self, entry: Path, read: Recipe, kernel_set: str, options: Mapping[str, Any]) -> contract.Session:
        from kedge_targets.backends.tensorrt import api, engine, engine_selection
        from kedge_targets.worker import environment

        bench = _bench(entry, read, options, Path(options.get(CACHE) or environment.cache_dir()))
        kept = engine_selection.engine(bench, kernel_set, _logged)
        measured = f" ({options[REASON]})" if options.get(REASON) else ""
        return engine.Session(
            api.load(),
            kept.payload,
            engine.Tensors(read.inputs, read.outputs),
            detail=f"{bench.here}, {kernel_set}{measured}",
        )

    def _fall_back(
        self, entry: Path, read: Recipe, kernel_set: str | None, options: Mapping[str, Any], reason: str
    ) -> contract.Session:
        # ONNX Runtime's CUDA kernels compute quantized layers in float, with the quantization beside it.
        wanted = kernel_set or (FP16 if fallback.has_cuda() else INT8)
        taken = _offered(read, FP16 if wanted == COARSE else wanted)
        graph = entry.parent / read.files[taken]
        raw = half_precision.of(graph) if wanted == COARSE else None
        return fallback.Session(graph, taken, threads=options.get("threads", 0), reason=reason, raw=raw)


def _offered(read: Recipe, kernel_set: str | None) -> str:
    """Return the requested kernel set if the recipe has it, else its first."""
    return kernel_set if kernel_set in read.precisions else read.precisions[0]


def _bench(entry: Path, read: Recipe, options: Mapping[str, Any], cache: Path) -> Bench:
    from kedge_targets.backends.tensorrt import cache as kept
    from kedge_targets.backends.tensorrt import device, engine_selection

    return engine_selection.Bench(
        entry=entry,
        recipe=read,
        here=device.identity(),
        cache=kept.Cache(cache / "tensorrt"),
        limits=engine_selection.Limits(
            seconds=float(options.get("build_seconds") or engine_selection.Limits.seconds),
            memory_bytes=int(options.get("build_mib", 0)) << 20,
        ),
        available=memory.of_device,
    )


def _check(options: Mapping[str, Any], kernel_set: str | None) -> None:
    if unknown := sorted(set(options) - _KNOWN_OPTIONS - _OWN):
        raise ConfigError(f"unknown runtime option {unknown[0]!r}", remedy=f"Known are {sorted(_KNOWN_OPTIONS)}")
    for name in _KNOWN_OPTIONS & set(options):
        value = options[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
            raise ConfigError(f"{name} = {value!r} is no number of 0 or more")
    if kernel_set not in (None, INT8, FP16, COARSE):
        raise ConfigError(f"unknown kernel set {kernel_set!r}", remedy=f"Known are {INT8}, {FP16} and {COARSE}")


def _logged(what: str, done: int, total: int) -> None:
    log.info("%s: %d of %d", what, done, total)
