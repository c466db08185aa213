"""Rewrites what OpenVINO (2026.4) gets wrong when it fuses operators or moves one past another, in float as in
integers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kedge_targets.graph import opsets
from kedge_targets.graph.names import Names
from kedge_targets.graph.wiring import SAME_VALUES, Wiring

if TYPE_CHECKING:
    import onnx

_OPSET = 10
"""The first in which Slice takes its bounds as inputs, and Max reads tensors of unlike shapes."""
_ACTIVATIONS = frozenset({
    "Abs", "Clip", "Elu", "Gelu", "HardSwish", "LeakyRelu", "Mish", "Mul", "PRelu", "Round", "Swish", "Tanh",
})  # fmt: skip
"""Activations that may fall somewhere, or that one which does may follow; ``x sigmoid(x)`` ends in a ``Mul``."""
_ELEMENTWISE = _ACTIVATIONS | {
    "Add", "BatchNormalization", "Cast", "Div", "Erf", "Exp", "HardSigmoid", "Identity", "Max", "Min", "Neg", "Pow",
    "Relu", "Sigmoid", "Softplus", "Sqrt", "Sub", "Sum",
}  # fmt: skip
_INTO_WEIGHTS = frozenset({"Add", "BatchNormalization", "Div", "Identity", "Mul", "Sub"})


def without_wrong_fusions(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return an equivalent copy that OpenVINO computes as ONNX says; the given model if it has nothing of the kind.

    Args:
        model: with shapes inferred.
    """
    import onnx

    affected = {"Gather", "MaxPool", "Split"} & {node.op_type for node in model.graph.node}
    if not affected or opsets.version(model) < _OPSET:
        return model
    made = onnx.ModelProto()
    made.CopyFrom(model)
    _hold_activations_behind_pools(made)
    _order_channels_twice(made)
    _step_before_convolutions(made)
    return model if len(made.graph.node) == len(model.graph.node) else made


def barriers(model: onnx.ModelProto) -> list[str]:
    """Return the names of the nodes that only keep others apart, and need no integers."""
    wiring = Wiring(model)
    found = []
    for node in model.graph.node:
        least = wiring.constant(node.input[1]) if node.op_type == "Max" and len(node.input) == 2 else None
        if least is not None and np.isneginf(least).all():
            found.append(node.name)
    return found


def _hold_activations_behind_pools(model: onnx.ModelProto) -> None:
    """Put the maximum with minus infinity behind each MaxPool between a convolution and an activation. The CPU plugin
    applies the activation before the pooling, as part of the convolution, which is right of one that never falls."""
    from onnx import helper, numpy_helper

    wiring, names = Wiring(model), Names(model)
    values = (*model.graph.value_info, *model.graph.output)
    types = {value.name: helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type) for value in values}
    made: list[onnx.NodeProto] = []
    for node in model.graph.node:
        made.append(node)
        answer = node.output[0] if node.output else ""
        if node.op_type != "MaxPool" or not _of_convolution(wiring, node.input[0]) or not _activated(wiring, answer):
            continue
        pooled, least = names.fresh(f"{answer}_pooled"), names.fresh(f"{answer}_least")
        value = np.full(1, -np.inf, types.get(answer, np.float32))
        model.graph.initializer.append(numpy_helper.from_array(value, least))
        node.output[0] = pooled
        made.append(helper.make_node("Max", [pooled, least], [answer], name=names.fresh_node(pooled)))
    _replace(model, made)


def _of_convolution(wiring: Wiring, tensor: str) -> bool:
    """Return whether a convolution computes the tensor, with nothing behind it but what becomes part of its weights."""
    maker = wiring.maker.get(tensor)
    while maker is not None and maker.op_type in _INTO_WEIGHTS:
        maker = next((wiring.maker.get(name) for name in maker.input if wiring.constant(name) is None), None)
    return maker is not None and maker.op_type == "Conv"


def _activated(wiring: Wiring, tensor: str) -> bool:
    """Return whether an activation reads these values."""
    pending = [tensor]
    while pending:
        for reader, _ in wiring.readers.get(pending.pop(), ()):
            scaled = reader.op_type == "Mul" and any(wiring.constant(name) is not None for name in reader.input)
            if reader.op_type in _ACTIVATIONS and not scaled:
                return True
            if reader.op_type in SAME_VALUES:
                pending.append(reader.output[0])
    return False


def _order_channels_twice(model: onnx.ModelProto) -> None:
    """Write each Gather that changes the order of an axis as two, either of which swaps pairs. OpenVINO moves the order
    into the weights of a convolution behind it, where it ought to be the inverse; of swaps that is the same."""
    from onnx import numpy_helper

    wiring, names = Wiring(model), Names(model)
    made: list[onnx.NodeProto] = []
    for node in model.graph.node:
        made.append(node)
        order = wiring.constant(node.input[1]) if node.op_type == "Gather" else None
        if order is None or order.ndim != 1 or not np.array_equal(np.sort(order), np.arange(len(order))):
            continue
        if np.array_equal(order[order], np.arange(len(order))):
            continue
        answer, swapped = node.output[0], names.fresh(f"{node.output[0]}_swapped")
        stored = [names.fresh(f"{node.input[1]}_{which}") for which in ("first", "second")]
        for value, name in zip(_swaps(order), stored, strict=True):
            model.graph.initializer.append(numpy_helper.from_array(value, name))
        second = type(node)()
        second.CopyFrom(node)
        second.name, second.input[:], second.output[:] = names.fresh_node(swapped), [swapped, stored[1]], [answer]
        node.input[1], node.output[0] = stored[0], swapped
        made.append(second)
    _replace(model, made)


def _swaps(order: Any) -> tuple[Any, Any]:
    """Return two orders that are their own inverses, and that one after the other are the given one. Along a cycle c of
    it (``order[c[i]] = c[i + 1]``), the second swaps c[i] and c[-i], and the first c[i] and c[1 - i]."""
    first, second = np.arange(len(order)), np.arange(len(order))
    left = set(range(len(order)))
    while left:
        cycle = [min(left)]
        while (after := int(order[cycle[-1]])) != cycle[0]:
            cycle.append(after)
        left -= set(cycle)
        at = np.arange(len(cycle))
        second[cycle] = np.array(cycle)[-at]
        first[cycle] = np.array(cycle)[(1 - at) % len(cycle)]
    return first, second


def _step_before_convolutions(model: onnx.ModelProto) -> None:
    """Let a Slice make the steps of each convolution over single positions that reads parts of a Split, with nothing
    but elementwise operators between. OpenVINO moves the steps up to the Split, which it cannot pass, and takes them in
    one branch only, or fails ("UnsupportedNodesStridesPropagation")."""
    from onnx import helper, numpy_helper

    wiring, names = Wiring(model), Names(model)
    made: list[onnx.NodeProto] = []
    for node in model.graph.node:
        steps = _steps(node, wiring)
        if steps and _of_parts(wiring, node.input[0]):
            taken, rank = names.fresh(f"{node.input[0]}_taken"), len(steps)
            bounds = np.array([[0] * rank, [np.iinfo(np.int64).max] * rank, range(2, 2 + rank), steps])
            stored = [names.fresh(f"{taken}_{what}") for what in ("starts", "ends", "axes", "steps")]
            for name, value in zip(stored, bounds, strict=True):
                model.graph.initializer.append(numpy_helper.from_array(value, name))
            made.append(helper.make_node("Slice", [node.input[0], *stored], [taken], name=names.fresh_node(taken)))
            node.input[0] = taken
            next(one for one in node.attribute if one.name == "strides").ints[:] = [1] * rank
        made.append(node)
    _replace(model, made)


def _steps(node: onnx.NodeProto, wiring: Wiring) -> list[int]:
    """Return the strides of a convolution over single positions; none of others, and none of strides of 1."""
    from onnx import helper

    if node.op_type != "Conv":
        return []
    weight = wiring.constant(node.input[1])
    how = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    kernel = how.get("kernel_shape", () if weight is None else weight.shape[2:])
    strides = list(how.get("strides", ()))
    single = bool(kernel) and all(one == 1 for one in kernel) and not any(how.get("pads", ()))
    return strides if single and any(one > 1 for one in strides) else []


def _of_parts(wiring: Wiring, tensor: str) -> bool:
    pending, seen = [tensor], {tensor}
    while pending:
        maker = wiring.maker.get(pending.pop())
        if maker is not None and maker.op_type == "Split":
            return True
        if maker is not None and maker.op_type in _ELEMENTWISE:
            pending += set(maker.input) - seen
            seen |= set(maker.input)
    return False


def _replace(model: onnx.ModelProto, made: list[onnx.NodeProto]) -> None:
    del model.graph.node[:]
    model.graph.node.extend(made)
