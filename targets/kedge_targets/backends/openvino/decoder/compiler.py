"""Compiles decoders for OpenVINO: a stateful intermediate representation that openvino-genai opens too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kedge_protocol.bundle.config import RuntimeRequirement
from kedge_protocol.errors import LoweringError
from kedge_targets.backends.openvino import devices, library
from kedge_targets.decoder import contract
from kedge_targets.decoder.contract import Ends, LoweredDecoder
from kedge_targets.decoder.layout import HeadLayout
from kedge_targets.decoder.plan import PROBES, Piece, Pieces
from kedge_targets.decoder.spec import Array, DecoderSpec

ENTRY, DATA = "openvino_model.xml", "openvino_model.bin"
"""The names that openvino-genai looks for."""
_HEAD_MULTIPLE = 16
"""As ONNX Runtime has it, so that what was rounded for one can be stored for the other."""
_GROUPS = (16, 32, 64, 128, 256)
_MINIMUM = "2026.4"
"""The version on which states and kernels were proved."""
_SCALE_BYTES = 8
"""Of a head's keys or values at one position in int8: a scale and a zero-point."""
_GROWTH = 2
"""A state that is full gets twice the positions that it needs."""


class Compiler(contract.DecoderCompiler):
    """See :class:`kedge_targets.decoder.contract.DecoderCompiler`."""

    def objection(self, kind: str, options: Mapping[str, Any]) -> str:
        """See :meth:`kedge_targets.decoder.contract.DecoderCompiler.objection`."""
        if kind != contract.DECODERS:
            return f"OpenVINO takes no {kind}"
        device = devices.settings(options).device
        return "" if device == devices.CPU else f"OpenVINO takes them on its CPU alone, not on {device}"

    def layout(self, spec: DecoderSpec) -> HeadLayout:
        """See :meth:`kedge_targets.decoder.contract.DecoderCompiler.layout`."""
        return HeadLayout.of(spec, multiple=_HEAD_MULTIPLE)

    def groups(self, columns: int) -> tuple[int, ...]:
        """See :meth:`kedge_targets.decoder.contract.DecoderCompiler.groups`."""
        return tuple(group for group in _GROUPS if group <= max(columns, _GROUPS[0]))

    def lower(self, spec: DecoderSpec, ends: Ends, pieces: Pieces, *, context: int, workdir: Path) -> LoweredDecoder:
        """See :meth:`kedge_targets.decoder.contract.DecoderCompiler.lower`."""
        from kedge_targets.backends.openvino.decoder.graph import NO_WINDOWS, WINDOWS, DecoderGraph

        openvino = library.load()
        layout = self.layout(spec)
        graph = DecoderGraph(spec, layout, context=context)
        position_bytes, int8 = 0, False
        try:
            graph.begin(ends.embedding, ends.positions)
            for index in range(len(spec.layers)):
                piece = pieces(index)
                int8 = int8 or piece.cache is not None
                graph.layer(index, piece)
                position_bytes += 2 * spec.kv_heads * (layout.size + _SCALE_BYTES if int8 else 4 * layout.size)
            graph.end(ends.norm, ends.head, ends.head_bias)
            model = graph.model()
            for name, value in _runtime_options(int8=int8).items():
                model.set_rt_info(value, ["runtime_options", name])
            if all(kind.window is None for kind in spec.layers):
                model.set_rt_info(NO_WINDOWS, WINDOWS)
            openvino.serialize(model, workdir / ENTRY, workdir / DATA)
        except Exception as error:  # the library raises RuntimeError and its own, without a common base
            raise LoweringError(
                f"OpenVINO refuses the graph: {library.reason_of(error)}", where=spec.architecture
            ) from error
        return LoweredDecoder(
            files={ENTRY: workdir / ENTRY, DATA: workdir / DATA},
            entry=ENTRY,
            runtimes=(RuntimeRequirement(distribution="openvino", minimum=_MINIMUM),),
            tools={"openvino": openvino.__version__.split("-")[0]},
            position_bytes=_GROWTH * position_bytes,
        )

    def layer_runner(self, spec: DecoderSpec, index: int, piece: Piece, *, context: int) -> LayerRunner:
        """See :meth:`kedge_targets.decoder.contract.DecoderCompiler.layer_runner`."""
        from kedge_targets.backends.openvino.decoder.graph import DecoderGraph

        graph = DecoderGraph(spec, self.layout(spec), context=context, probes=True)
        try:
            graph.begin(None)
            graph.layer(index, piece)
            graph.end(None, None)
            settings = {**devices.Settings().hints(devices.supported(core := library.load().Core(), devices.CPU))}
            compiled = core.compile_model(graph.model(), devices.CPU, settings)
        except Exception as error:  # the library raises RuntimeError and its own, without a common base
            raise LoweringError(
                f"OpenVINO refuses layer {index}: {library.reason_of(error)}", where=spec.architecture
            ) from error
        return LayerRunner(compiled, graph)


def _runtime_options(*, int8: bool) -> dict[str, str]:
    """Return what the file itself asks of every runtime, openvino-genai included.

    Args:
        int8: whether keys and values are stored in 8 bits.
    """
    found = {"KV_CACHE_PRECISION": "u8" if int8 else "f32"}
    if not _has_dot_products():
        # Processors with dot products round the activations of coded matrices to 8 bits. What that changes cannot be
        # measured here, so no device does it.
        found["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = "0"
    return found


def _has_dot_products() -> bool:
    """Return whether this processor adds products of 8 bits in 32 bits."""
    try:
        return "vnni" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


class LayerRunner(contract.LayerRunner):
    """A compiled layer.

    Args:
        graph: what it was compiled from: it owns the constants.
    """

    def __init__(self, compiled: Any, graph: object) -> None:
        self._compiled = compiled
        self._graph = graph
        self._inputs = {one.get_any_name() for one in compiled.inputs}

    def run(self, hidden: Array) -> tuple[Array, dict[str, Array]]:
        """See :meth:`kedge_targets.decoder.contract.LayerRunner.run`."""
        found = self._outputs(hidden)
        return found["hidden_out"][0], {name: found[f"probe.{name}"][0] for name in PROBES}

    def cached(self, hidden: Array) -> tuple[Array, Array]:
        """See :meth:`kedge_targets.decoder.contract.LayerRunner.cached`."""
        found = self._outputs(hidden)
        return found["keys"][0], found["values"][0]

    def _outputs(self, hidden: Array) -> dict[str, Array]:
        positions = len(hidden)
        feeds = {
            "hidden": hidden[None],
            "attention_mask": np.ones((1, positions), np.int64),
            "position_ids": np.arange(positions)[None],
        }
        try:
            found = self._compiled({name: feeds[name] for name in self._inputs})
        except Exception as error:  # the library raises RuntimeError and its own, without a common base
            raise LoweringError(f"OpenVINO cannot run a layer: {library.reason_of(error)}") from error
        return {key.get_any_name(): value for key, value in found.items()}
