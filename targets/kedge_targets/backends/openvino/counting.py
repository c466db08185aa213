"""Counts the weights and multiply-accumulates of an intermediate representation by number format."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kedge_targets.backends.openvino import library
from kedge_targets.graph import einsum_equation
from kedge_targets.true_precision import Numbers

_CONVOLUTIONS = ("Convolution", "GroupConvolution")
_BACKWARDS = ("ConvolutionBackpropData", "GroupConvolutionBackpropData")
_RECURRENT = ("LSTMSequence", "GRUSequence", "RNNSequence", "LSTMCell", "GRUCell", "RNNCell")
_PASSES_INTEGERS = frozenset({
    "Reshape", "Squeeze", "Unsqueeze", "Transpose", "MaxPool", "Split", "VariadicSplit", "StridedSlice", "Slice",
    "Concat", "Relu", "ShuffleChannels", "DepthToSpace", "SpaceToDepth", "BatchToSpace", "SpaceToBatch", "Gather",
})  # fmt: skip
"""Operators after which OpenVINO continues in integers."""
_READS_BACK = {"Multiply": ("Convert", "Subtract"), "Subtract": ("Convert",)}
"""Last operators on a weight's path from integers: operator → what may precede it."""
_LARGE = 1024


def numbers(entry: Path, shapes: Mapping[str, Sequence[int]]) -> Numbers:
    """Count the weights and multiply-accumulates; see :func:`kedge_targets.graph.counting.numbers`.

    Args:
        entry: path of the ``.xml``; its weights lie beside it.
        shapes: input → shape of one sample, batch included.
    """
    model = library.load().Core().read_model(str(entry))
    fixed = {}
    for port in model.inputs:
        given = next((shapes[name] for name in port.get_names() if name in shapes), ())
        partial = port.get_partial_shape()
        fixed[port] = [
            dim.get_length() if dim.is_static else int(given[axis]) if axis < len(given) else 1
            for axis, dim in enumerate(partial)
        ]
    if any(port.get_partial_shape().is_dynamic for port in model.inputs):
        model.reshape(fixed)
    return _counted(model)


def _counted(model: Any) -> Numbers:
    weights: dict[int, tuple[str, int]] = {}
    macs = integer_macs = 0
    rounds = False
    operations = model.get_ordered_ops()
    for operation in operations:
        kind = operation.get_type_name()
        rounds = rounds or kind == "FakeQuantize"
        if kind == "Constant":
            _weigh(operation, weights)
        count = _multiplications(operation, kind)
        macs += count
        if count and kind not in _RECURRENT and all(_integers(operation.input_value(index)) for index in (0, 1)):
            integer_macs += count
    sizes: dict[str, int] = {}
    for name, size in weights.values():
        sizes[name] = sizes.get(name, 0) + size
    rounds = rounds or any(name.startswith(("int", "uint")) for name in sizes)
    return Numbers(weight_bytes=dict(sorted(sizes.items())), macs=macs, integer_macs=integer_macs, rounds=rounds)


def _weigh(operation: Any, weights: dict[int, tuple[str, int]]) -> None:
    """Count a constant that a layer multiplies, or a large one; biases, scales and ranges do not count. Constants that
    lie at the same place in the file count once.

    Args:
        weights: place in memory → dtype and bytes.
    """
    name = _dtype(operation.get_element_type())
    shape = tuple(operation.get_output_shape(0))
    count = _product(shape)
    if name.startswith(("int64", "int32", "bool")) or len(shape) < 2:
        return
    if count >= _LARGE or _feeds_layer(operation):
        place = int(operation.data.ctypes.data)
        weights[place] = (name, -(-count * operation.get_element_type().bitwidth // 8))


def _feeds_layer(operation: Any) -> bool:
    pending, seen = [operation], 0
    while pending and seen < 16:
        seen += 1
        for target in pending.pop().output(0).get_target_inputs():
            reader, index = target.get_node(), target.get_index()
            kind = reader.get_type_name()
            if kind in _RECURRENT:
                return bool(index < reader.get_input_size() - 1)  # the last is the bias
            if kind in (*_CONVOLUTIONS, *_BACKWARDS, "MatMul", "Einsum"):
                return True
            # The scale and zero-point of a weight lie beside it: index 1.
            if index == 0 and kind in ("Convert", "Subtract", "Multiply", "Reshape", "Transpose", "FakeQuantize"):
                pending.append(reader)
    return False


def _integers(port: Any) -> bool:
    """Return whether a port delivers an integer that is read as a float."""
    node = port.get_node()
    while True:
        kind = node.get_type_name()
        if kind == "FakeQuantize":
            return True
        before = node.input_value(0).get_node().get_type_name() if node.get_input_size() else ""
        if before in _READS_BACK.get(kind, ()):
            node = node.input_value(0).get_node()
        elif kind == "Convert":
            return _dtype(node.input_value(0).get_element_type()).startswith(("int8", "uint8", "int4", "uint4"))
        elif kind == "Concat":
            return all(_integers(node.input_value(index)) for index in range(node.get_input_size()))
        elif kind in _PASSES_INTEGERS:
            node = node.input_value(0).get_node()
        else:
            return False


def _multiplications(operation: Any, kind: str) -> int:
    if kind in _CONVOLUTIONS:
        made, factor = operation.get_output_shape(0), operation.get_input_shape(1)
        return _product([made[0], *made[2:]]) * _product(factor)
    if kind in _BACKWARDS:
        given, factor = operation.get_input_shape(0), operation.get_input_shape(1)
        return _product([given[0], *given[2:]]) * _product(factor)
    if kind == "MatMul":
        given = operation.get_input_shape(0)
        inner = given[-2] if operation.get_attributes().get("transpose_a") and len(given) > 1 else given[-1]
        return _product(operation.get_output_shape(0)) * int(inner)
    if kind == "Einsum":
        shapes = [operation.get_input_shape(index) for index in range(operation.get_input_size())]
        summed = einsum_equation.summed(operation.get_attributes()["equation"], shapes)
        return _product(operation.get_output_shape(0)) * summed
    if kind in _RECURRENT:
        shapes = [operation.get_input_shape(index) for index in range(operation.get_input_size())]
        matrices = [shape for shape in shapes[-3:] if len(shape) >= 2]
        length = shapes[0][1] if kind.endswith("Sequence") else 1
        return int(length) * sum(_product(shape) for shape in matrices[:2])
    return 0


def _dtype(element: Any) -> str:
    name = str(element.get_type_name())
    renamed = {"f": "float", "i": "int", "u": "uint", "bf": "bfloat"}
    letters = name.rstrip("0123456789")
    return f"{renamed.get(letters, letters)}{name[len(letters) :]}"


def _product(dims: Sequence[int]) -> int:
    return math.prod(max(1, int(dim)) for dim in dims)
