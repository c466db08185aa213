"""Finds the node that a conversion fails on where the vendor's message names none: nodes are converted alone."""

from __future__ import annotations

import time
from typing import Any

_LONGEST_SECONDS = 60.0


def culprit(model: Any, converts: Any) -> Any:
    """Return the first node that fails alone too; None if each passes, or time is up.

    Args:
        model: a checked ONNX model with inferred shapes. Of alike nodes (operator, attributes, shapes) one is tried.
        converts: serialized model of one node → raises where it cannot be converted.
    """
    until = time.monotonic() + _LONGEST_SECONDS
    graph = model.graph
    values = {value.name: value for value in (*graph.input, *graph.value_info, *graph.output)}
    stored = {tensor.name: tensor for tensor in graph.initializer}
    tried = set()
    for node in graph.node:
        alone = _alone(model, node, values, stored)
        kind = _kind(node, values)
        if alone is None or kind in tried:
            continue
        if time.monotonic() > until:
            return None
        tried.add(kind)
        try:
            converts(alone.SerializeToString())
        except BaseException:  # noqa: BLE001 -- the vendor's tools also leave by sys.exit()
            return node
    return None


def _alone(model: Any, node: Any, values: dict[str, Any], stored: dict[str, Any]) -> Any:
    """Return a model of one node; None if it reads or makes what has no known shape, or holds graphs of its own."""
    import onnx
    from onnx import helper

    own = [name for name in node.input if name in stored]
    given = [name for name in dict.fromkeys(node.input) if name and name not in stored]
    made = [name for name in node.output if name]
    known = all(name in values and values[name].type.tensor_type.HasField("shape") for name in (*given, *made))
    if not given or not known or any(attribute.HasField("g") for attribute in node.attribute):
        return None
    graph = helper.make_graph(
        [node], "alone", [values[name] for name in given], [values[name] for name in made], [stored[one] for one in own]
    )
    return onnx.helper.make_model(graph, opset_imports=list(model.opset_import), ir_version=model.ir_version)


def _kind(node: Any, values: dict[str, Any]) -> Any:
    """Return what nodes have in common that are converted alike."""
    shapes = [values[name].type.SerializeToString() for name in (*node.input, *node.output) if name in values]
    attributes = sorted(attribute.SerializeToString() for attribute in node.attribute)
    return node.domain, node.op_type, tuple(attributes), tuple(shapes)
