"""A decoder's graph that computes in float32 what the file says in float16: how far the two are apart tells how far a
GPU, which rounds in other places than a processor does, may be from both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kedge_protocol.errors import MissingDependencyError
from kedge_protocol.packages import pip_install


def of(entry: Path) -> bytes:
    """Return the graph with every constant, input and output of float16 in float32; large constants stay in the file
    beside it, and are converted as the graph is loaded.

    Raises:
        MissingDependencyError: the package ``onnx`` is missing; only the host calls this function.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingDependencyError(f"onnx cannot be loaded: {error}", remedy=pip_install("compile")) from error
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    model = onnx.load(str(entry), load_external_data=False)
    graph = model.graph
    renamed = {one.name: f"{one.name}.single" for one in graph.initializer if one.data_type == half}
    for node in graph.node:
        for at, name in enumerate(node.input):
            node.input[at] = renamed.get(name, name)
        _set_type(node, half, single)
    casts = [onnx.helper.make_node("Cast", [name], [new], to=single) for name, new in renamed.items()]
    for at, cast in enumerate(casts):
        graph.node.insert(at, cast)
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == half:
            value.type.tensor_type.elem_type = single
    return bytes(model.SerializeToString())


def _set_type(node: Any, half: int, single: int) -> None:
    """Let a Cast to float16 be one to float32."""
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == half:
            attribute.i = single
