"""Reduces overhead bytes of a graph: stores equal constants once and shortens tensor names. In a network for a
microcontroller they are a fifth of the file."""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

_DIGITS = string.ascii_lowercase + string.digits
_LARGE = 1 << 16
"""Size, in bytes, from which a constant counts as a weight; no two weights are assumed equal."""
_UNNAMED = frozenset({"QuantizeLinear", "DequantizeLinear"})
"""Operators that belong to rounding; none of them is a layer of the user."""


def share_constants(model: onnx.ModelProto) -> None:
    """Store equal initializers once, in place; most zero-points are equal."""
    if _nested(model):
        return
    kept: dict[bytes, str] = {}
    renamed: dict[str, str] = {}
    fixed = _fixed(model)
    for tensor in list(model.graph.initializer):
        if tensor.name in fixed or tensor.ByteSize() > _LARGE:
            continue
        first = kept.setdefault(_content(tensor), tensor.name)
        if first != tensor.name:
            renamed[tensor.name] = first
            model.graph.initializer.remove(tensor)
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name in renamed:
                node.input[index] = renamed[name]


def shorten_names(model: onnx.ModelProto) -> None:
    """Give every tensor between the graph's inputs and outputs a short name, in place. Nodes keep their names, which
    identify layers, except nodes that only round."""
    if _nested(model):
        return
    fixed = _fixed(model)
    names = (name for name in _short() if name not in fixed)
    given: dict[str, str] = {"": ""} | {name: name for name in fixed}

    def short(name: str) -> str:
        if name not in given:
            given[name] = next(names)
        return given[name]

    for node in model.graph.node:
        for ends in (node.input, node.output):
            for index, name in enumerate(ends):
                ends[index] = short(name)
        if node.op_type in _UNNAMED:
            node.name = ""
    for tensor in model.graph.initializer:
        tensor.name = short(tensor.name)
    for value in model.graph.value_info:
        value.name = short(value.name)


def _fixed(model: onnx.ModelProto) -> set[str]:
    """Return the names that callers know."""
    return {value.name for value in (*model.graph.input, *model.graph.output)}


def _nested(model: onnx.ModelProto) -> bool:
    """Return whether a node holds a nested graph, which may read outer tensors by name."""
    return any(attribute.HasField("g") or attribute.graphs for node in model.graph.node for attribute in node.attribute)


def _content(tensor: onnx.TensorProto) -> bytes:
    """Return dtype, shape and values."""
    import onnx

    nameless = onnx.TensorProto()
    nameless.CopyFrom(tensor)
    nameless.name = ""
    return bytes(nameless.SerializeToString(deterministic=True))


def _short() -> Iterator[str]:
    """Yield short names: a, b, ..., then a letter followed by letters or digits; never a number alone."""
    for length in itertools.count(1):
        for rest in itertools.product(_DIGITS, repeat=length - 1):
            for first in string.ascii_lowercase:
                yield first + "".join(rest)
