"""Where a graph of integers leaves them: what stays in float beside that which must, so that nothing is rounded for
nothing, and nothing read back in vain."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from kedge_targets.graph import dead
from kedge_targets.graph.wiring import Wiring

if TYPE_CHECKING:
    import onnx

_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_ROUNDING = frozenset({"Add", "AveragePool", "GlobalAveragePool", "LeakyRelu", "Mul", "Resize", "Sigmoid", "Sub"})
"""Operators without weights whose integer form rounds once more; others only pick or move integers."""


def extended(model: onnx.ModelProto, floating: Collection[str], integer_operators: Collection[str]) -> list[str]:
    """All nodes that are to stay in float, in the graph's order: those that must, those without an integer form, and
    the nodes without weights between them. What works for layers in float alone wants no rounding (the sums of a
    transformer before each LayerNormalization), and what reads them alone would round twice.

    Args:
        floating: names of nodes that must.
        integer_operators: those with an integer form.
    """
    wiring = Wiring(model)
    found = {node.name for node in model.graph.node if node.op_type not in integer_operators} | set(floating)
    for node in model.graph.node:
        makers = [wiring.maker.get(name) for name in node.input if name and wiring.constant(name) is None]
        if node.op_type in _ROUNDING and makers and all(maker is not None and maker.name in found for maker in makers):
            found.add(node.name)
    for node in reversed(model.graph.node):
        readers = [reader.name for tensor in node.output for reader, _ in wiring.readers[tensor]]
        if not readers or wiring.outputs & set(node.output) or _weighted(node, wiring):
            continue
        if all(name in found for name in readers):
            found.add(node.name)
    return [node.name for node in model.graph.node if node.name in found]


def _weighted(node: onnx.NodeProto, wiring: Wiring) -> bool:
    """Whether it multiplies, or looks its answer up in a table."""
    return node.op_type in _WEIGHTED or (node.op_type == "Gather" and wiring.constant(node.input[0]) is not None)


def free_inputs(model: onnx.ModelProto, floating: Collection[str]) -> None:
    """Let these nodes read what they read unrounded, in place, where that costs nothing: where no other node needs it
    in integers, or where it is made in float anyway. Pairs of QuantizeLinear and DequantizeLinear that nobody reads any
    more are taken away."""
    wiring = Wiring(model)
    for back in [node for node in model.graph.node if node.op_type == "DequantizeLinear"]:
        down = wiring.maker.get(back.input[0])
        if down is None or down.op_type != "QuantizeLinear" or back.output[0] in wiring.outputs:
            continue
        source = wiring.maker.get(down.input[0])
        in_float = source is not None and source.name in floating
        readers = wiring.readers[back.output[0]]
        free = [(reader, index) for reader, index in readers if reader.name in floating]
        if len(free) < len(readers) and not in_float:
            continue
        for reader, index in free:
            reader.input[index] = down.input[0]
    dead.removed(model)


def pick_before_reading_back(model: onnx.ModelProto) -> None:
    """Let each Gather that looks up rows in a table of integers do so before DequantizeLinear rather than behind it, in
    place. Else ONNX Runtime reads the whole table back in each call, where nothing behind the Gather is an integer."""
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
