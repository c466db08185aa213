"""Rewrites MaxPool with padding using operators that int8 can represent: onnx2tf pads with the lowest float, and a
tensor that holds it has no scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kedge_protocol.errors import UnsupportedOperatorError
from kedge_targets.graph.auto_pad import explicit_pads
from kedge_targets.graph.wiring import Wiring

if TYPE_CHECKING:
    import onnx

_FAR = 2**31 - 1  # as the end of a slice: up to the last


def spell_out_pads(model: onnx.ModelProto) -> None:
    """Put the padding of each MaxPool before it, in place: zeros if its input is never negative, else the input's own
    edge, which changes no maximum as long as the padding is narrower than the window. Padding that TensorFlow supports
    itself is written as ``SAME``. Shapes must have been inferred.

    Raises:
        UnsupportedOperatorError: a window is dilated, which neither converter knows.
    """
    wiring = Wiring(model)
    shapes = _shapes(model)
    made: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type == "MaxPool" and node.domain in ("", "ai.onnx") and len(node.output) == 1:
            made += _before(node, shapes.get(node.input[0]), wiring, model)
        made.append(node)
    del model.graph.node[:]
    model.graph.node.extend(made)


def _before(
    node: onnx.NodeProto, shape: Sequence[int] | None, wiring: Wiring, model: onnx.ModelProto
) -> list[onnx.NodeProto]:
    import onnx
    from onnx import helper

    given: dict[str, Any] = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    kernel = [int(size) for size in given["kernel_shape"]]
    if any(int(one) != 1 for one in given.get("dilations", ())):
        raise UnsupportedOperatorError(
            "a MaxPool whose windows have gaps cannot be converted",
            where=f"node {node.name!r}",
            remedy="Export the model without dilations in its pooling, or choose a target with another backend",
        )
    pads = _pads(given, kernel, shape)
    if pads is None or not any((*pads[0], *pads[1])):
        return []
    if pads == _same(given, kernel, shape):
        _set(node, auto_pad="SAME_UPPER")
        return []
    source, name = node.input[0], node.name
    if wiring.never_negative(source):
        numbers = [0, 0, *pads[0], 0, 0, *pads[1]]
        answer = f"{name}_padded"
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(numbers, np.int64), f"{name}_pads"))
        found = [helper.make_node("Pad", [source, f"{name}_pads"], [answer], name=f"{name}_pad")]
    else:
        found, answer = _edges(source, name, pads, model)
    node.input[0] = answer
    _set(node)
    return found


def _set(node: onnx.NodeProto, **padding: str) -> None:
    """Replace the attributes of a node that tell how it pads."""
    from onnx import helper

    kept = [item for item in node.attribute if item.name not in ("pads", "auto_pad", "ceil_mode")]
    del node.attribute[:]
    node.attribute.extend([*kept, *(helper.make_attribute(name, value) for name, value in padding.items())])


def _pads(given: dict[str, Any], kernel: list[int], shape: Sequence[int] | None) -> tuple[list[int], list[int]] | None:
    """Return the padding before and behind each spatial axis, or None if the node may stay as it is."""
    axes = len(kernel)
    strides = [int(one) for one in given.get("strides", [1] * axes)]
    if shape is None or len(shape) != axes + 2:
        return None
    sizes = list(shape[2:])
    how = given.get("auto_pad", b"NOTSET").decode()
    if how != "NOTSET":
        before, behind = explicit_pads(how, sizes, kernel, strides, [1] * axes)
    else:
        numbers = [int(one) for one in given.get("pads", [0] * 2 * axes)]
        before, behind = numbers[:axes], numbers[axes:]
    if given.get("ceil_mode", 0):
        behind = [
            end + _started(size + start + end, width, stride, size + start)
            for size, width, stride, start, end in zip(sizes, kernel, strides, before, behind, strict=True)
        ]
    if any(one >= width for one, width in zip((*before, *behind), kernel * 2, strict=True)):
        return None
    return before, behind


def _same(given: dict[str, Any], kernel: list[int], shape: Sequence[int] | None) -> tuple[list[int], list[int]]:
    """Return the padding that TensorFlow calls ``SAME``."""
    strides = [int(one) for one in given.get("strides", [1] * len(kernel))]
    return explicit_pads("SAME_UPPER", list(shape or ())[2:], kernel, strides, [1] * len(kernel))


def _started(size: int, kernel: int, stride: int, real: int) -> int:
    """Return how far a last partial window reaches beyond the end (ONNX omits one that would begin in the padding)."""
    windows = -(-(size - kernel) // stride) + 1
    if (windows - 1) * stride >= real:
        windows -= 1
    return max(0, (windows - 1) * stride + kernel - size)


def _edges(
    source: str, name: str, pads: tuple[list[int], list[int]], model: onnx.ModelProto
) -> tuple[list[onnx.NodeProto], str]:
    """Return nodes that repeat the first and last row, then column."""
    from onnx import helper

    made: list[onnx.NodeProto] = []
    for axis, (before, behind) in enumerate(zip(*pads, strict=True), start=2):
        if not before and not behind:
            continue
        parts = [source]
        for count, start, end, side in ((before, 0, 1, "first"), (behind, -1, _FAR, "last")):
            if not count:
                continue
            edge = f"{name}_{side}_{axis}"
            bounds = [_stored(model, f"{edge}_{what}", value) for what, value in
                      (("from", start), ("to", end), ("axis", axis))]  # fmt: skip
            made.append(helper.make_node("Slice", [source, *bounds], [edge], name=edge))
            parts = [edge] * count + parts if side == "first" else parts + [edge] * count
        source = f"{name}_padded_{axis}"
        made.append(helper.make_node("Concat", parts, [source], name=source, axis=axis))
    return made, source


def _stored(model: onnx.ModelProto, name: str, value: int) -> str:
    import onnx

    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([value], np.int64), name))
    return name


def _shapes(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Return tensor → its shape, if every axis is known."""
    found = {}
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(dim.dim_value > 0 for dim in dims):
            found[value.name] = [int(dim.dim_value) for dim in dims]
    return found
