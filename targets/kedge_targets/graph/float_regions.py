"""Extends the float regions of an integer graph, so that no value is rounded or dequantized without need."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from kedge_targets.graph.qdq_placement import ANSWERS_IN_FLOAT, CUTTING, MOVING, WEIGHTED
from kedge_targets.graph.wiring import Wiring

if TYPE_CHECKING:
    import onnx

_ROUNDING = frozenset({
    "Add", "AveragePool", "Concat", "GlobalAveragePool", "LeakyRelu", "Mul", "Resize", "Sigmoid", "Sub",
})  # fmt: skip
"""Operators without weights whose integer form rounds again; others only select or move integers."""


def extend_float_regions(
    model: onnx.ModelProto, floating: Collection[str], integer_operators: Collection[str]
) -> list[str]:
    """Return all nodes that stay in float, in graph order: those that must, those without an integer form, and nodes
    without weights between them and the outputs. Nodes that serve only float layers need no rounding (a transformer's
    sums before each LayerNormalization), and nodes that read only those would round twice. Outputs are float, so nodes
    that join them (boxes beside scores) round nothing.

    Args:
        floating: names of nodes that must.
        integer_operators: those with an integer form.
    """
    wiring = Wiring(model)
    must = {node.name for node in model.graph.node if node.op_type not in integer_operators} | set(floating)
    found = set(must)
    for node in model.graph.node:
        makers = [wiring.maker.get(name) for name in node.input if name and wiring.constant(name) is None]
        if node.op_type in _ROUNDING and makers and all(maker is not None and maker.name in found for maker in makers):
            found.add(node.name)
    for node in reversed(model.graph.node):
        readers = [reader.name for tensor in node.output for reader, _ in wiring.readers[tensor]]
        if _weighted(node, wiring) or _ends_a_convolution(node, wiring, found):
            continue
        if (readers or wiring.outputs & set(node.output)) and all(name in found for name in readers):
            found.add(node.name)
    for node in model.graph.node:
        maker = wiring.maker.get(node.input[0]) if node.input else None
        if node.op_type not in MOVING - _ROUNDING or node.name in must or maker is None or maker.name in found:
            continue
        # Integers are there, and moving them is exact and moves a quarter of the bytes.
        if maker.op_type not in ANSWERS_IN_FLOAT and not _weighted_gather(maker, wiring):
            found.discard(node.name)
    return [node.name for node in model.graph.node if node.name in found]


def _ends_a_convolution(node: onnx.NodeProto, wiring: Wiring, found: Collection[str]) -> bool:
    """Return whether it is fused with a convolution, whose output must be rounded anyway."""
    maker = wiring.maker.get(node.input[0]) if node.op_type in CUTTING else None
    if maker is None or maker.op_type != "Conv" or maker.name in found:
        return False
    return len(wiring.readers[node.input[0]]) == 1 and node.input[0] not in wiring.outputs


def _weighted_gather(node: onnx.NodeProto, wiring: Wiring) -> bool:
    return node.op_type == "Gather" and wiring.constant(node.input[0]) is not None


def _weighted(node: onnx.NodeProto, wiring: Wiring) -> bool:
    """Return whether it multiplies, or looks values up in a table."""
    return node.op_type in WEIGHTED or _weighted_gather(node, wiring)


def pick_before_reading_back(model: onnx.ModelProto) -> None:
    """Move each Gather on an integer table before its DequantizeLinear, in place. Otherwise ONNX Runtime dequantizes
    the whole table in each call if nothing behind the Gather is an integer."""
    wiring = Wiring(model)
    behind: dict[str, onnx.NodeProto] = {}
    for node in model.graph.node:
        back = wiring.maker.get(node.input[0]) if node.op_type == "Gather" else None
        if back is None or back.op_type != "DequantizeLinear" or wiring.constant(back.input[0]) is None:
            continue
        scale = wiring.constant(back.input[1])
        if scale is None or scale.size != 1 or len(wiring.readers[back.output[0]]) != 1:
            continue
        node.input[0] = back.input[0]
        back.output[0], node.output[0] = node.output[0], back.output[0]
        back.input[0] = node.output[0]
        behind[node.name] = back
    if not behind:
        return
    moved = {back.name for back in behind.values()}
    ordered: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.name not in moved:
            ordered.append(node)
        if node.name in behind:
            ordered.append(behind[node.name])
    del model.graph.node[:]
    model.graph.node.extend(ordered)
