"""Keeps apart what ONNX Runtime (1.31) fuses or moves wrongly, by a Sum of one tensor: a copy that its optimizer
neither removes nor moves integers across."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kedge_targets.graph import dead_code, topological_order
from kedge_targets.graph.names import Names
from kedge_targets.graph.qdq_placement import MOVING
from kedge_targets.graph.wiring import SAME_VALUES, Wiring

if TYPE_CHECKING:
    import onnx


def insert(model: onnx.ModelProto) -> None:
    """Insert barriers in place, where they are needed."""
    names = Names(model)
    copies = [
        *_before_nested_readers(model, names),
        *_before_softmax(model, names),
        *_before_averages(model, names),
    ]
    if copies:
        arranged = topological_order.sort_nodes([*model.graph.node, *copies])
        del model.graph.node[:]
        model.graph.node.extend(arranged)


def _before_nested_readers(model: onnx.ModelProto, names: Names) -> list[onnx.NodeProto]:
    """Copy each tensor that a nested graph reads and that only moved values lead to from a DequantizeLinear. ONNX
    Runtime moves the DequantizeLinear behind such nodes, to each reader by the index of its input. A graph within a
    node reads without having an index, and the process ends with "Assertion '__n < this->size()' failed"."""
    wiring = Wiring(model)
    nesting = [node for node in model.graph.node if any(one.HasField("g") or one.graphs for one in node.attribute)]
    read = set().union(*map(dead_code.inputs_of, nesting))
    copies = []
    for tensor in sorted(read & wiring.maker.keys()):
        if not _moved(tensor, wiring):
            continue
        maker, before = wiring.maker[tensor], names.fresh(f"{tensor}_moved")
        maker.output[list(maker.output).index(tensor)] = before
        for reader, index in wiring.readers[tensor]:
            reader.input[index] = before
        copies.append(_copy(before, tensor, names))
    return copies


def _before_softmax(model: onnx.ModelProto, names: Names) -> list[onnx.NodeProto]:
    """Copy the input of each Softmax: in integers (QLinearSoftmax) its answers are rounded down instead of to the
    nearest, which ruins what follows where they differ little, and over an axis with one element they are 0."""
    return [_input_apart(node, names) for node in _reading_back("Softmax", model, Wiring(model))]


def _before_averages(model: onnx.ModelProto, names: Names) -> list[onnx.NodeProto]:
    """Copy the input of each average with a border whose last windows may reach beyond it: in integers
    (QLinearAveragePool) these windows count places that are not there."""
    flags = {"ceil_mode", "count_include_pad"}
    return [
        _input_apart(node, names)
        for node in _reading_back("AveragePool", model, Wiring(model))
        if flags <= {attribute.name for attribute in node.attribute if attribute.i}
    ]


def _reading_back(operator: str, model: onnx.ModelProto, wiring: Wiring) -> list[onnx.NodeProto]:
    """Return the nodes of an operator that read a DequantizeLinear."""
    found = [node for node in model.graph.node if node.op_type == operator and node.input[0] in wiring.maker]
    return [node for node in found if wiring.maker[node.input[0]].op_type == "DequantizeLinear"]


def _input_apart(node: onnx.NodeProto, names: Names) -> onnx.NodeProto:
    given, node.input[0] = node.input[0], names.fresh(f"{node.input[0]}_apart")
    return _copy(given, node.input[0], names)


def _copy(source: str, name: str, names: Names) -> onnx.NodeProto:
    from onnx import helper

    return helper.make_node("Sum", [source], [name], name=names.fresh_node(f"{name}_copy"))


def _moved(tensor: str, wiring: Wiring) -> bool:
    """Return whether a tensor is made by nodes that only move the values of a DequantizeLinear before them."""
    maker = wiring.maker[tensor]
    while maker.op_type in MOVING | SAME_VALUES:
        behind = wiring.maker.get(maker.input[0])
        if behind is None:
            return False
        if behind.op_type == "DequantizeLinear":
            return True
        maker = behind
    return False
