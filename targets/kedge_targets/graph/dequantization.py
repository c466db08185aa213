"""Restores the float graph of a file that is already quantized by QuantizeLinear and DequantizeLinear pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.errors import UnsupportedOperatorError
from kedge_targets.graph import dead_code
from kedge_targets.graph.wiring import Wiring

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]

_INTEGER_OPERATORS = frozenset({
    "ConvInteger", "DynamicQuantizeLinear", "MatMulInteger", "QGemm", "QLinearAdd", "QLinearConcat", "QLinearConv",
    "QLinearGlobalAveragePool", "QLinearMatMul", "QLinearMul", "QLinearSigmoid", "DynamicQuantizeMatMul",
})  # fmt: skip


def restored(model: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """Return the model without its pairs, and a note; the given model if it has none. Weights are dequantized,
    activations are no longer rounded. Clipping at 0 stays: quantizers drop a Relu if unsigned integers do its work.

    Raises:
        UnsupportedOperatorError: the file holds operators on integers instead of pairs; names the first.
    """
    for node in model.graph.node:
        if node.op_type in _INTEGER_OPERATORS:
            raise UnsupportedOperatorError(
                f"computes with integers already ({node.op_type})",
                where=f"node {node.name!r}",
                remedy="Give the float model, or one quantized in the QDQ format; Kedge quantizes it for each target",
            )
    if not any(node.op_type == "DequantizeLinear" for node in model.graph.node):
        return model, ()
    import onnx

    given, model = model, onnx.ModelProto()
    model.CopyFrom(given)
    wiring = Wiring(model)
    changed = {node.output[0]: made for node in model.graph.node if (made := _instead(node, wiring, model)) is not None}
    kept = [changed.get(node.output[0] if node.output else "", node) for node in model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(node for node in kept if node.op_type)
    dead_code.remove_dead_nodes(model)
    return model, ("the model was quantized already: its weights are taken as they are",)


def own_ranges(model: onnx.ModelProto) -> dict[str, tuple[float, float]]:
    """Return activation → range that its pair represents, for a file that is already quantized."""
    wiring = Wiring(model)
    found = {}
    for node in model.graph.node:
        down = wiring.maker.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if down is None or down.op_type != "QuantizeLinear" or wiring.constant(node.input[1]) is None:
            continue
        low, high = _bounds(node, wiring)
        if wiring.constant(down.input[0]) is None and np.isfinite([low, high]).all():
            found[down.input[0]] = (low, high)
    return found


def _instead(node: onnx.NodeProto, wiring: Wiring, model: onnx.ModelProto) -> onnx.NodeProto | None:
    """Return the replacement of a DequantizeLinear; a node without an operator if it disappears; None for other
    nodes."""
    import onnx

    if node.op_type != "DequantizeLinear" or wiring.constant(node.input[1]) is None:
        return None
    value = wiring.constant(node.input[0])
    if value is not None:
        made = onnx.numpy_helper.from_array(_values(value, node, wiring), node.output[0])
        model.graph.initializer.append(made)
        return onnx.NodeProto(output=[node.output[0]])
    down = wiring.maker.get(node.input[0])
    if down is None or down.op_type != "QuantizeLinear" or wiring.constant(down.input[1]) is None:
        return None
    low, high = _bounds(node, wiring)
    if low == 0 and not wiring.never_negative(down.input[0]):
        names = [f"{node.output[0]}_low", f"{node.output[0]}_high"]
        for name, bound in zip(names, (low, high), strict=True):
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(bound, np.float32), name))
        return onnx.helper.make_node("Clip", [down.input[0], *names], [node.output[0]], name=node.name)
    return onnx.helper.make_node("Identity", [down.input[0]], [node.output[0]], name=node.name)


def _values(value: Array, node: onnx.NodeProto, wiring: Wiring) -> Array:
    scale, zero = _parameters(node, wiring)
    how = {item.name: int(item.i) for item in node.attribute}
    axis = how.get("axis", 1)
    if block := how.get("block_size", 0):  # one scale for so many along the axis, the last block may be shorter
        whole = np.arange(value.shape[axis]) // block
        scale, zero = np.take(scale, whole, axis), np.take(zero, whole, axis) if zero.ndim else zero
    elif scale.ndim == 1 and scale.size > 1:
        shape = [1] * value.ndim
        shape[axis] = -1
        scale, zero = scale.reshape(shape), zero.reshape(shape) if zero.ndim else zero
    return np.asarray((value.astype(np.float64) - zero) * scale, np.float32)


def _bounds(node: onnx.NodeProto, wiring: Wiring) -> tuple[float, float]:
    """Return the range that the pair's integers represent."""
    scale, _ = _parameters(node, wiring)
    zero = wiring.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros((), np.uint8)
    if zero is None or scale.size != 1 or zero.dtype.kind not in "iu":
        return -np.inf, np.inf
    info = np.iinfo(zero.dtype)
    at, step = float(zero.reshape(-1)[0]), float(scale.reshape(-1)[0])
    return (info.min - at) * step, (info.max - at) * step


def _parameters(node: onnx.NodeProto, wiring: Wiring) -> tuple[Array, Array]:
    scale = wiring.constant(node.input[1])
    zero = wiring.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    return np.asarray(scale, np.float64), np.asarray(0.0 if zero is None else zero, np.float64)
