"""Compiles decoders for ONNX Runtime: a small graph and a file of constants beside it, which the runtime
memory-maps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from kedge_protocol.bundle.config import RuntimeRequirement
from kedge_protocol.errors import LoweringError
from kedge_targets.backends.onnxruntime.decoder.windows import window_of
from kedge_targets.decoder import contract
from kedge_targets.decoder.contract import EncoderParts, Ends, LoweredDecoder
from kedge_targets.decoder.exported import ExportedSpec
from kedge_targets.decoder.layout import HeadLayout
from kedge_targets.decoder.matrix import Codes
from kedge_targets.decoder.plan import PROBES, Piece, Pieces
from kedge_targets.decoder.spec import Array, DecoderSpec, LayerKind
from kedge_targets.decoder.windows import Window
from kedge_targets.graph import library

ENTRY = "decoder.onnx"
DATA = "decoder.bin"
_HEAD_MULTIPLE = 16
"""GroupQueryAttention only rotates heads whose size is a multiple of this."""
_GROUPS = (16, 32, 64, 128, 256)
_MINIMUM = "1.23"
"""The first version with CPU kernels for 8 bits in MatMulNBits and GatherBlockQuantized."""
_MINIMUM_NEWER_CACHES = "1.31"
"""The version on which caches in int8, and caches of windows, were proved."""


@dataclass(frozen=True)
class _Cache:
    """A layer's keys and values.

    Attributes:
        position_bytes: of one position of one slot.
        window: what it holds; None for the whole context.
        newer: whether it is one in int8, which older versions do not take.
    """

    position_bytes: int
    window: Window | None
    newer: bool


class Compiler(contract.DecoderCompiler):
    """See :class:`kedge_targets.decoder.contract.DecoderCompiler`.

    Attributes:
        half: whether the graph computes in float16.
        windows: whether layers with a window have caches of their own size.
    """

    half = False
    windows = True

    def layout(self, spec: DecoderSpec) -> HeadLayout:
        """See :meth:`kedge_targets.decoder.contract.DecoderCompiler.layout`."""
        return HeadLayout.of(spec, multiple=_HEAD_MULTIPLE)

    def groups(self, columns: int) -> tuple[int, ...]:
        """See :meth:`kedge_targets.decoder.contract.DecoderCompiler.groups`."""
        return tuple(group for group in _GROUPS if group <= max(columns, _GROUPS[0]))

    def cache_positions(self, kind: LayerKind, context: int) -> int:
        """See :meth:`kedge_targets.decoder.contract.DecoderCompiler.cache_positions`."""
        window = self._window(kind, context)
        return context if window is None else window.room

    def _window(self, kind: LayerKind, context: int) -> Window | None:
        return window_of(kind, context) if self.windows else None

    def runtimes(self, minimum: str) -> tuple[RuntimeRequirement, ...]:
        """Return the distributions of which one must be installed, from this version on."""
        return (RuntimeRequirement(distribution="onnxruntime", minimum=minimum),)

    def lower(self, spec: DecoderSpec, ends: Ends, pieces: Pieces, *, context: int, workdir: Path) -> LoweredDecoder:
        """See :meth:`kedge_targets.decoder.contract.DecoderCompiler.lower`."""
        from kedge_targets.backends.onnxruntime.decoder.graph import DecoderGraph
        from kedge_targets.backends.onnxruntime.decoder.writer import GraphWriter

        caches = []
        with GraphWriter(workdir / DATA, half=self.half) as writer:
            graph = DecoderGraph(writer, spec, self.layout(spec), context=context, windows=self.windows)
            graph.begin(ends.embedding, ends.positions, ends.relative)
            for index in range(len(spec.layers)):
                piece = pieces(index)
                graph.layer(index, piece)
                caches.append(self._cache(spec, index, piece, context))
            graph.end(ends.norm, ends.head, ends.head_bias)
            (workdir / ENTRY).write_bytes(writer.model().SerializeToString(deterministic=True))
        return self._lowered(workdir, (ENTRY, DATA), caches)

    def lower_parts(
        self, spec: DecoderSpec, ends: Ends, pieces: Pieces, cuts: Sequence[int], *, context: int, workdir: Path
    ) -> tuple[LoweredDecoder, ...]:
        """See :meth:`kedge_targets.decoder.contract.DecoderCompiler.lower_parts`."""
        from kedge_targets.backends.onnxruntime.decoder.graph import DecoderGraph
        from kedge_targets.backends.onnxruntime.decoder.stage import HEAD
        from kedge_targets.backends.onnxruntime.decoder.writer import Constants, GraphWriter

        layout, found = self.layout(spec), []
        for first, last in itertools.pairwise((0, *cuts, len(spec.layers))):
            folder, caches = workdir / f"layers-{first}", []
            folder.mkdir()
            with Constants(folder / DATA, shared=True) as data:
                graphs = {ENTRY: GraphWriter(data)}
                graph = DecoderGraph(graphs[ENTRY], spec, layout, context=context, windows=self.windows)
                if first:
                    graph.go_on()
                else:
                    graph.begin(ends.embedding, ends.positions)
                for index in range(first, last):
                    piece = pieces(index)
                    graph.layer(index, piece)
                    caches.append(self._cache(spec, index, piece, context))
                graph.stop()
                if not first:
                    graphs[HEAD] = GraphWriter(data)
                    closing = DecoderGraph(graphs[HEAD], spec, layout, context=context)
                    closing.head(ends.embedding, ends.norm, ends.head, ends.head_bias)
                for title, one in graphs.items():
                    (folder / title).write_bytes(one.model().SerializeToString(deterministic=True))
            found.append(replace(self._lowered(folder, (*graphs, DATA), caches), layers=(first, last)))
        return tuple(found)

    def _cache(self, spec: DecoderSpec, index: int, piece: Piece, context: int) -> _Cache:
        numbers = 2 * spec.kv_heads * self.layout(spec).size
        itemsize = self.cache_itemsize if piece.cache is None else 1
        return _Cache(numbers * itemsize, self._window(spec.layers[index], context), newer=piece.cache is not None)

    def _lowered(self, folder: Path, titles: Sequence[str], caches: Sequence[_Cache]) -> LoweredDecoder:
        """Return the files of layers with these caches."""
        newer = any(one.newer or one.window is not None for one in caches)
        return LoweredDecoder(
            files={title: folder / title for title in titles},
            entry=ENTRY,
            runtimes=self.runtimes(_MINIMUM_NEWER_CACHES if newer else _MINIMUM),
            tools={"onnx": metadata.version("onnx")},
            position_bytes=sum(one.position_bytes for one in caches if one.window is None),
            window_bytes=sum(one.position_bytes * one.window.room for one in caches if one.window is not None),
        )

    def lower_with_encoder(
        self, spec: DecoderSpec, ends: Ends, pieces: Pieces, encoder: EncoderParts, *, context: int, workdir: Path
    ) -> LoweredDecoder:
        """See :meth:`kedge_targets.decoder.contract.DecoderCompiler.lower_with_encoder`."""
        from kedge_targets.backends.onnxruntime.decoder.encoder_graph import EncoderGraph
        from kedge_targets.backends.onnxruntime.decoder.graph import DecoderGraph
        from kedge_targets.backends.onnxruntime.decoder.session import ENCODER
        from kedge_targets.backends.onnxruntime.decoder.writer import Constants, GraphWriter

        if spec.encoder is None:
            raise LoweringError("the model has no encoder", where=spec.architecture)
        layout = self.layout(spec)
        with Constants(workdir / DATA, shared=True) as data:
            listener, writer = GraphWriter(data), GraphWriter(data)
            source = EncoderGraph(listener, spec, spec.encoder)
            source.write(encoder)
            graph = DecoderGraph(writer, spec, layout, context=context)
            graph.begin(ends.embedding, ends.positions, ends.relative)
            for index in range(len(spec.layers)):
                piece = pieces(index)
                source.keys_and_values(index, piece)
                graph.layer(index, piece)
            graph.end(ends.norm, ends.head, ends.head_bias)
            for title, one in ((ENCODER, listener), (ENTRY, writer)):
                (workdir / title).write_bytes(one.model().SerializeToString(deterministic=True))
        layers = len(spec.layers)
        return LoweredDecoder(
            files={title: workdir / title for title in (ENTRY, ENCODER, DATA)},
            entry=ENTRY,
            runtimes=(RuntimeRequirement(distribution="onnxruntime", minimum=_MINIMUM),),
            tools={"onnx": metadata.version("onnx")},
            position_bytes=2 * 4 * layers * spec.kv_heads * layout.size,
            source_position_bytes=2 * 4 * layers * spec.heads * spec.head_size,
        )

    def lower_exported(
        self, source: Path, spec: ExportedSpec, rounded: Callable[[Array], Codes] | None, *, workdir: Path
    ) -> LoweredDecoder:
        """See :meth:`kedge_targets.decoder.contract.DecoderCompiler.lower_exported`."""
        from kedge_targets.backends.onnxruntime.decoder import exported

        return exported.lowered(source, spec, rounded, workdir=workdir, entry=ENTRY, data=DATA, minimum=_MINIMUM)

    def layer_runner(self, spec: DecoderSpec, index: int, piece: Piece, *, context: int) -> LayerRunner:
        """See :meth:`kedge_targets.decoder.contract.DecoderCompiler.layer_runner`."""
        from kedge_targets.backends.onnxruntime.decoder.graph import DecoderGraph
        from kedge_targets.backends.onnxruntime.decoder.writer import GraphWriter

        with GraphWriter() as writer:
            graph = DecoderGraph(writer, spec, self.layout(spec), context=context, probes=True)
            graph.begin(None)
            graph.layer(index, piece)
            graph.end(None, None)
            raw = writer.model().SerializeToString()
        onnxruntime = library.load()
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        try:
            session = onnxruntime.InferenceSession(raw, settings, providers=["CPUExecutionProvider"])
        except Exception as error:  # the library's errors have no common base but Exception
            raise LoweringError(
                f"ONNX Runtime refuses layer {index}: {library.reason_of(error)}", where=spec.architecture
            ) from error
        return LayerRunner(session, index, spec.kv_heads, self.layout(spec).size)


class LayerRunner(contract.LayerRunner):
    """An ONNX Runtime session of one layer."""

    def __init__(self, session: Any, index: int, kv_heads: int, head_size: int) -> None:
        self._session = session
        self._index = index
        self._cache = (1, kv_heads, head_size)

    def run(self, hidden: Array) -> tuple[Array, dict[str, Array]]:
        """See :meth:`kedge_targets.decoder.contract.LayerRunner.run`."""
        names = ["hidden_out", *(f"probe.{self._index}.{name}" for name in PROBES)]
        found = self._outputs(names, hidden)
        return found[0][0], {name: value[0] for name, value in zip(PROBES, found[1:], strict=True)}

    def cached(self, hidden: Array) -> tuple[Array, Array]:
        """See :meth:`kedge_targets.decoder.contract.LayerRunner.cached`."""
        keys, values = self._outputs([f"present.{self._index}.{part}" for part in "kv"], hidden)
        return keys[0], values[0]

    def _outputs(self, names: list[str], hidden: Array) -> list[Array]:
        positions = hidden.shape[0]
        rows, heads, size = self._cache
        empty = np.zeros((rows, heads, positions, size), np.float32)
        feeds = {
            "hidden": hidden[None],
            "seqlens_k": np.array([positions - 1], np.int32),
            "total": np.array([positions], np.int32),
            **{f"past.{self._index}.{part}": empty for part in "kv"},
        }
        try:
            found: list[Array] = self._session.run(names, feeds)
        except Exception as error:  # the library's errors have no common base but Exception
            raise LoweringError(f"ONNX Runtime cannot run layer {self._index}: {library.reason_of(error)}") from error
        return found
