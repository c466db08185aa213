"""Gives each layer its own copy of a shared constant if that costs next to nothing: vectors (exporters merge equal
biases), and masks expanded once for all heads. Otherwise they would tie the channels of all those layers together.
Weights stay shared."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

_MOVING = frozenset({"Reshape", "Transpose", "Unsqueeze", "Squeeze", "Identity", "Cast", "Flatten"})


def split_shared_initializers(model: onnx.ModelProto) -> None:
    """Copy each constant vector, and each Expand with the nodes that only rearrange its result, for every reader but
    the first, in place. The copies are named after the originals."""
    _vectors(model)
    _masks(model)


def _vectors(model: onnx.ModelProto) -> None:
    import onnx

    graph = model.graph
    vectors = {
        tensor.name: tensor
        for tensor in graph.initializer
        if sum(dim > 1 for dim in tensor.dims) == 1 and tensor.data_type != onnx.TensorProto.INT64
    }
    taken: dict[str, int] = defaultdict(int)
    names = {tensor.name for tensor in graph.initializer} | {name for node in graph.node for name in node.output}
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name not in vectors:
                continue
            taken[name] += 1
            if taken[name] == 1:
                continue
            copy = onnx.TensorProto()
            copy.CopyFrom(vectors[name])
            copy.name = f"{name}_for_{taken[name]}"
            while copy.name in names:
                copy.name += "_"
            names.add(copy.name)
            graph.initializer.append(copy)
            node.input[index] = copy.name


def _masks(model: onnx.ModelProto) -> None:
    graph = model.graph
    readers: dict[str, list[tuple[onnx.NodeProto, int]]] = defaultdict(list)
    for node in graph.node:
        for index, name in enumerate(node.input):
            readers[name].append((node, index))
    answers = {value.name for value in graph.output}

    def ends(path: list[onnx.NodeProto]) -> list[tuple[list[onnx.NodeProto], onnx.NodeProto, int]]:
        found = []
        for node, index in readers[path[-1].output[0]]:
            if node.op_type in _MOVING and index == 0 and node.output[0] not in answers:
                found += ends([*path, node])
            else:
                found.append((path, node, index))
        return found

    copies: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    names = {node.name for node in graph.node}
    for node in [node for node in graph.node if node.op_type == "Expand"]:
        for number, (path, reader, index) in enumerate(ends([node])[1:], start=2):
            reader.input[index] = _copied(path, f"{node.name}_for_{number}", names, copies)
    if not copies:
        return
    made: list[onnx.NodeProto] = []
    for node in graph.node:
        made += [node, *copies[node.name]]
    nodes = [type(node).FromString(node.SerializeToString()) for node in made]
    del graph.node[:]
    graph.node.extend(nodes)


def _copied(path: list[onnx.NodeProto], suffix: str, names: set[str], copies: dict[str, list[onnx.NodeProto]]) -> str:
    """Copy a chain of nodes to behind its last node; return the name of the last copy's output."""
    source = path[0].input[0]
    for node in path:
        copy = type(node).FromString(node.SerializeToString())
        copy.name = f"{node.name}_{suffix}"
        while copy.name in names:
            copy.name += "_"
        names.add(copy.name)
        copy.input[0] = source
        copy.output[0] = source = copy.name
        copies[path[-1].name].append(copy)
    return str(source)
