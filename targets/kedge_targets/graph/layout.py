"""Finds the layout of an input from its first convolution or pooling."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

# Their first input is N, C, then the spatial axes (ONNX operator specifications).
_CHANNELS_FIRST = frozenset({
    "Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "MaxPool", "AveragePool", "LpPool", "GlobalAveragePool",
    "GlobalMaxPool", "GlobalLpPool", "BatchNormalization", "InstanceNormalization", "LRN", "DepthToSpace",
    "SpaceToDepth", "GroupNormalization",
})  # fmt: skip

# They leave the axes where they are.
_SAME_AXES = frozenset({
    "Identity", "Cast", "Relu", "LeakyRelu", "Clip", "Sigmoid", "Tanh", "Neg", "Abs", "Sqrt", "Pow", "Dropout", "Pad",
    "Add", "Sub", "Mul", "Div", "QuantizeLinear", "DequantizeLinear", "Resize", "Upsample",
})  # fmt: skip

_SPATIAL = {3: "W", 4: "HW", 5: "DHW"}


def layout_of(model: onnx.ModelProto, name: str) -> str | None:
    """``NCHW``, ``NHWC``, … of the input ``name``, found by following it to the first operator that fixes the axes,
    through transpositions and element-wise operators; None where the graph does not tell."""
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in model.graph.input}
    rank = ranks.get(name)
    if rank not in _SPATIAL:
        return None
    consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in model.graph.node:
        for given in set(node.input):
            consumers[given].append(node)
    # Which axis of the input lies at each axis of the tensor that is followed.
    pending = [(name, tuple(range(rank)))]
    seen = {name}
    while pending:
        tensor, axes = pending.pop(0)
        for node in consumers[tensor]:
            if node.domain not in ("", "ai.onnx"):
                continue
            if node.op_type in _CHANNELS_FIRST and node.input[0] == tensor:
                letters = dict(zip(axes, "NC" + _SPATIAL[rank], strict=True))
                return "".join(letters[axis] for axis in range(rank))
            moved = _moved(node, axes)
            if moved is not None and node.output[0] not in seen:
                seen.add(node.output[0])
                pending.append((node.output[0], moved))
    return None


def _moved(node: onnx.NodeProto, axes: tuple[int, ...]) -> tuple[int, ...] | None:
    if node.op_type in _SAME_AXES:
        return axes
    if node.op_type == "Transpose":
        given = [tuple(attribute.ints) for attribute in node.attribute if attribute.name == "perm"]
        permutation = given[0] if given else tuple(reversed(range(len(axes))))
        return tuple(axes[axis] for axis in permutation)
    return None
