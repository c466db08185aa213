"""Quantizes a float graph to a QONNX graph of few bits, by calibration alone; or takes a QONNX graph as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kedge_protocol.errors import LoweringError, UnsupportedOperatorError
from kedge_targets.backends.finn import convertibility, graph_preparation, wide_inputs
from kedge_targets.backends.finn.wide_inputs import WideInput
from kedge_targets.contract import Array, Calibration
from kedge_targets.graph import fakequant, model_reader, node_tracing, qonnx_nodes, quantizer_preparation, signature
from kedge_targets.numerics import Family, Plan, Precision

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A graph that FINN takes.

    Attributes:
        model: QONNX graph, one sample at once.
        given: the user's graph, as read.
        samples: number of calibration samples actually used.
        notes: what was changed.
        taken: whether it was already quantized.
        wide: what the processor does with the input, if its quantizer is too wide for the fabric.
    """

    model: onnx.ModelProto
    given: onnx.ModelProto
    samples: int
    notes: tuple[str, ...]
    taken: bool
    wide: WideInput | None = None


def quantize_graph(
    graph: Path, plan: Plan, calibration: Calibration, *, workdir: Path, input_type: str | None = None
) -> Quantized:
    """Convert a graph to the form that FINN takes.

    Args:
        graph: a float graph, or one with QONNX's nodes; the latter uses neither plan nor calibration.
        input_type: see :func:`kedge_targets.backends.finn.convertibility.check`.

    Raises:
        UnsupportedOperatorError: FINN will not take the graph as one chain; names the node and what to change.
        LoweringError: the plan has a precision that the fabric does not support, or there are no calibration samples.
        ModelError: the graph is inconsistent.
    """
    given = model_reader.load(graph)
    _check_input(given)
    if qonnx_nodes.is_quantized(given):
        model = graph_preparation.single(given)
        graph_preparation.fold_constants(model)
        wide = wide_inputs.taken_out(model) if input_type is None else None
        notes = _arranged(model)
        convertibility.check(model, input_type=wide.datatype if wide is not None else input_type)
        if wide is not None:
            notes = (*notes, wide.note)
        return Quantized(model=model, given=given, samples=0, notes=notes, taken=True, wide=wide)
    _check_plan(plan)
    prepared = quantizer_preparation.prepare(graph_preparation.single(given), workdir / "prepared.onnx", quantized=True)
    graph_preparation.without_identities(prepared)
    carried = _carried(plan, given, prepared)
    # Whether it converts hangs on no range: it is judged before the calibration, which takes time.
    trial = fakequant.insert_quantizers(
        prepared, carried, dict.fromkeys(fakequant.tensors(prepared, carried), (0.0, 1.0))
    )
    _arranged(trial)
    convertibility.check(trial, input_type=input_type)
    if not calibration.samples:
        raise LoweringError("there are no calibration samples", remedy="Give at least one; some hundred are usual")
    counted = _Counted(calibration)
    found = fakequant.calibrate(prepared, carried, counted)
    model = fakequant.insert_quantizers(prepared, carried, found)
    notes = _arranged(model)
    return Quantized(model=model, given=given, samples=counted.used, notes=notes, taken=False)


def _arranged(model: onnx.ModelProto) -> tuple[str, ...]:
    """Apply what FINN needs beyond the quantizers, in place."""
    graph_preparation.without_identities(model)
    lacking = graph_preparation.complete_attributes(model)
    averages = graph_preparation.pooled_by_convolution(model)
    graph_preparation.quantized_before_moves(model)
    notes = []
    if lacking:
        notes.append(f"attributes that were left to ONNX's defaults are written out at {', '.join(lacking)}")
    if averages:
        notes.append(f"averages are built as convolutions with ones: {', '.join(averages)}")
    return tuple(notes)


def _check_input(model: onnx.ModelProto) -> None:
    for info in (*signature.inputs(model), *signature.outputs(model)):
        if info.dtype != "float32":
            raise UnsupportedOperatorError(
                f"has dtype {info.dtype}; the quantized graph begins and ends in float32",
                where=f"tensor {info.name!r}",
                remedy="Export the model with float32 inputs and outputs (integers come in as such numbers)",
            )


def _check_plan(plan: Plan) -> None:
    strange = [precision for precision in plan.precisions if precision.family is not Family.FABRIC]
    if strange:
        raise LoweringError(
            f"programmable logic computes with integers of few bits, not with {strange[0].value}",
            remedy=f"Take {', '.join(one.value for one in Precision if one.family is Family.FABRIC)}",
        )


def _carried(plan: Plan, given: onnx.ModelProto, prepared: onnx.ModelProto) -> Plan:
    """Return the plan for the prepared graph, whose nodes may have other names."""
    layers: dict[str, Precision] = {}
    names = {node.name for node in given.graph.node}
    if unknown := sorted(set(plan.layers) - names):
        raise LoweringError(
            "the plan names a layer that the graph has not",
            where=f"node {unknown[0]!r}",
            remedy="Take the names from the graph's nodes",
        )
    for name, precision in plan.layers.items():
        for there in node_tracing.trace_nodes([name], given, prepared):
            # Where nodes of several precisions were fused, the widest holds.
            if there not in layers or precision.weight_bits > layers[there].weight_bits:
                layers[there] = precision
    return dataclasses.replace(plan, layers=layers)


class _Counted:
    """The calibration, with a count of the samples read in one pass."""

    def __init__(self, calibration: Calibration) -> None:
        self._calibration = calibration
        self.used = 0

    @property
    def samples(self) -> int:
        """Return the number of samples."""
        return self._calibration.samples

    def __iter__(self) -> Iterator[dict[str, Array]]:
        self.used = 0
        for sample in self._calibration:
            self.used += 1
            yield sample
