"""Gives reductions of three axes a fourth one. Of integers in [N, rows, columns] the CPU plugin (2026.4) computes the
mean or the sum along the rows, and that along few columns, wrongly from the second sample of a batch on; with an axis
of length one more it is right."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from kedge_targets.graph import opsets
from kedge_targets.graph.names import Names
from kedge_targets.graph.wiring import Wiring

if TYPE_CHECKING:
    import onnx

_REDUCTIONS = {"ReduceMean": 18, "ReduceSum": 13}
"""Operator → the opset from which on its axes are an input."""
_SQUEEZED = 13
"""That opset for Squeeze and Unsqueeze."""
_WRONG = 3


def with_four_axes(model: onnx.ModelProto, *, but: Collection[str] = ()) -> None:
    """Widen the reductions of three axes, in place.

    Args:
        model: with shapes inferred; a tensor of unknown shape is left alone.
        but: names of nodes that stay as they are, since they stay in float.
    """
    from onnx import numpy_helper

    version = opsets.version(model)
    values = (*model.graph.value_info, *model.graph.input)
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in values}
    wiring, names = Wiring(model), Names(model)
    made: list[onnx.NodeProto] = []
    for node in model.graph.node:
        affected = bool(node.input) and ranks.get(node.input[0]) == _WRONG and node.name not in but
        axes = _axes(node, wiring, version) if affected else []
        if not axes or any(axis % _WRONG == 0 for axis in axes):
            made.append(node)
            continue
        widened = [axis % _WRONG + 1 for axis in axes]
        given, answer = node.input[0], node.output[0]
        wide, narrow = names.fresh(f"{given}_wide"), names.fresh(f"{answer}_wide")
        made.append(_shaped(model, "Unsqueeze", given, wide, names, version))
        node.input[0], node.output[0] = wide, narrow
        if version >= _REDUCTIONS[node.op_type]:
            node.input[1] = names.fresh(f"{narrow}_axes")
            model.graph.initializer.append(numpy_helper.from_array(np.array(widened), node.input[1]))
        else:
            attribute = next(one for one in node.attribute if one.name == "axes")
            attribute.ints[:] = widened
        made += [node, _shaped(model, "Squeeze", narrow, answer, names, version)]
    del model.graph.node[:]
    model.graph.node.extend(made)


def _axes(node: onnx.NodeProto, wiring: Wiring, version: int) -> list[int]:
    if node.op_type not in _REDUCTIONS:
        return []
    if version >= _REDUCTIONS[node.op_type]:
        value = wiring.constant(node.input[1]) if len(node.input) > 1 else None
        return [] if value is None else [int(axis) for axis in value.reshape(-1)]
    return [int(axis) for one in node.attribute if one.name == "axes" for axis in one.ints]


def _shaped(
    model: onnx.ModelProto, operator: str, given: str, answer: str, names: Names, version: int
) -> onnx.NodeProto:
    from onnx import helper, numpy_helper

    name = names.fresh_node(f"{answer}_{operator.lower()}")
    if version < _SQUEEZED:
        return helper.make_node(operator, [given], [answer], name=name, axes=[1])
    axes = names.fresh(f"{name}_axis")
    model.graph.initializer.append(numpy_helper.from_array(np.array([1]), axes))
    return helper.make_node(operator, [given, axes], [answer], name=name)
