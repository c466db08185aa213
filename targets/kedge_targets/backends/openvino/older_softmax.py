"""Rewrites the Softmax of opsets before 13, which is one over all axes from the given one on, for OpenVINO, which
(2026.4) reads it as one along the given axis alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kedge_targets.graph import opsets
from kedge_targets.graph.names import Names

if TYPE_CHECKING:
    import onnx

_ALONG_ONE_AXIS = 13
"""The opset from which on a Softmax runs along one axis (ONNX changelog, Softmax-13 and Hardmax-13)."""
_FLATTENING = frozenset({"Softmax", "Hardmax"})
_USUAL_AXIS = 1


def with_softmax_of_onnx(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which each Softmax and Hardmax over several axes is one of a matrix, flat as the old definition
    says; the given model if it has none."""
    if opsets.version(model) >= _ALONG_ONE_AXIS:
        return model
    values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in values}
    flat = {node.name for node in model.graph.node if node.op_type in _FLATTENING and not _along_last(node, ranks)}
    if not flat:
        return model
    import onnx
    from onnx import helper

    made = onnx.ModelProto()
    made.CopyFrom(model)
    names, arranged = Names(made), list[onnx.NodeProto]()
    for node in made.graph.node:
        if node.name not in flat:
            arranged.append(node)
            continue
        given, answer = node.input[0], node.output[0]
        matrix, rows, shape = (names.fresh(f"{answer}_{what}") for what in ("matrix", "rows", "shape"))
        arranged += [
            helper.make_node("Shape", [given], [shape], name=names.fresh_node(shape)),
            helper.make_node("Flatten", [given], [matrix], name=names.fresh_node(matrix), axis=_axis(node)),
            helper.make_node(node.op_type, [matrix], [rows], name=node.name, axis=_USUAL_AXIS),
            helper.make_node("Reshape", [rows, shape], [answer], name=names.fresh_node(rows)),
        ]
    del made.graph.node[:]
    made.graph.node.extend(arranged)
    return made


def _along_last(node: onnx.NodeProto, ranks: dict[str, int]) -> bool:
    return _axis(node) in (-1, ranks.get(node.input[0], 0) - 1)


def _axis(node: onnx.NodeProto) -> int:
    return next((int(one.i) for one in node.attribute if one.name == "axis"), _USUAL_AXIS)
