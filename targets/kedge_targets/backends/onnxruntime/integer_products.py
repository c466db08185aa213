"""Rewrites products of integers with a constant matrix into the form in which ONNX Runtime has the least overhead
around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge_targets.graph import dead_code
from kedge_targets.graph.wiring import Wiring

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]

_DOMAIN = "com.microsoft"


@dataclass(frozen=True, kw_only=True)
class _Bias:
    """A bias after a product: its name, the addition before it (at most one), and its own addition."""

    bias: str
    before: onnx.NodeProto | None
    added: onnx.NodeProto


def without_masks(model: onnx.ModelProto) -> None:
    """Remove, in place, each multiplication by a mask of zeros and ones whose result is quantized and multiplied by
    weights that are 0 wherever the mask is: the channel contributes nothing, masked or not. The range of the integers,
    which was found after the mask, stays."""
    wiring = Wiring(model)
    for node in model.graph.node:
        index = next((i for i, name in enumerate(node.input) if wiring.constant(name) is not None), None)
        if node.op_type != "Mul" or index is None or node.output[0] in wiring.outputs:
            continue
        mask = wiring.constant(node.input[index])
        if mask is None or mask.ndim != 1 or mask.size < 2 or not np.isin(mask, (0, 1)).all():
            continue
        rounding = wiring.readers[node.output[0]]
        if all(_meets_zeros(reader, place, mask == 0, wiring) for reader, place in rounding):
            for reader, place in rounding:
                reader.input[place] = node.input[1 - index]
    dead_code.remove_dead_nodes(model)


def with_biases(model: onnx.ModelProto) -> None:
    """Fuse each product with a float output and the bias added to it (possibly after another addition) into one
    MatMulIntegerToFloat, in place. ONNX Runtime (up to 1.31) fuses the product by itself, but adds the bias in a
    separate pass over the result."""
    from onnx import helper

    wiring = Wiring(model)
    gone: list[onnx.NodeProto] = []
    for node in model.graph.node:
        sides = _integer_sides(node, wiring)
        found = _bias_behind(node, wiring) if sides else None
        if sides is None or found is None or any(found.added is one for one in gone):
            continue
        left, right = sides
        fused = helper.make_node(
            "MatMulIntegerToFloat",
            [left.input[0], right.input[0], left.input[1], right.input[1], _zero(left), _zero(right), found.bias],
            [node.output[0]],
            name=node.name,
            domain=_DOMAIN,
        )
        node.CopyFrom(fused)
        (found.before or node).output[0] = found.added.output[0]
        gone.append(found.added)
    for added in gone:
        model.graph.node.remove(added)
    if gone and all(known.domain != _DOMAIN for known in model.opset_import):
        model.opset_import.append(helper.make_opsetid(_DOMAIN, 1))
    dead_code.remove_dead_nodes(model)


def _meets_zeros(down: onnx.NodeProto, place: int, masked: Array, wiring: Wiring) -> bool:
    """Return whether this is a QuantizeLinear whose integers go into products with weights that are 0 in these rows."""
    if down.op_type != "QuantizeLinear" or place != 0 or down.output[0] in wiring.outputs:
        return False
    for back, _ in wiring.readers[down.output[0]]:
        if back.op_type != "DequantizeLinear" or back.output[0] in wiring.outputs:
            return False
        for reader, index in wiring.readers[back.output[0]]:
            sides = _integer_sides(reader, wiring)
            weight = wiring.constant(sides[1].input[0]) if sides else None
            if index != 0 or weight is None or len(weight) != len(masked) or weight[masked].any():
                return False
    return True


def _integer_sides(node: onnx.NodeProto, wiring: Wiring) -> tuple[onnx.NodeProto, onnx.NodeProto] | None:
    """Return the DequantizeLinear nodes on both sides of a MatMul with a constant integer matrix: the left one with one
    scale, the right one with one scale for all or for each column and a zero-point of 0."""
    if node.op_type != "MatMul":
        return None
    left, right = (wiring.maker.get(name) for name in node.input)
    if left is None or right is None or {left.op_type, right.op_type} != {"DequantizeLinear"}:
        return None
    weight, scale, zero = (wiring.constant(name) for name in (right.input[0], right.input[1], _zero(right)))
    step = wiring.constant(left.input[1])
    if weight is None or scale is None or step is None or weight.ndim != 2 or step.size != 1:
        return None
    axis = next((attribute.i for attribute in right.attribute if attribute.name == "axis"), 1)
    by_column = scale.ndim == 1 and axis in (1, -1) and scale.size == weight.shape[1]
    if not (scale.size == 1 or by_column) or (_zero(right) and (zero is None or zero.any())):
        return None
    return left, right


def _zero(back: onnx.NodeProto) -> str:
    """Return the name of a DequantizeLinear's zero-point, or an empty string if it has none."""
    return back.input[2] if len(back.input) > 2 else ""


def _bias_behind(product: onnx.NodeProto, wiring: Wiring) -> _Bias | None:
    """Return the bias after a product, or None if there is none or another node reads a tensor in between."""
    weight = wiring.maker[product.input[1]].input[0]
    columns = None if (value := wiring.constant(weight)) is None else value.shape[1]
    tensor, before = product.output[0], None
    for _ in range(2):
        readers = wiring.readers[tensor]
        if len(readers) != 1 or tensor in wiring.outputs or readers[0][0].op_type != "Add":
            return None
        added, index = readers[0]
        name = added.input[1 - index]
        bias = wiring.constant(name)
        if bias is not None:
            return _Bias(bias=name, before=before, added=added) if bias.shape == (columns,) else None
        before, tensor = added, added.output[0]
    return None
