"""Removes dead code from graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kedge_targets.graph import nodes

if TYPE_CHECKING:
    import onnx


def remove_dead_nodes(model: onnx.ModelProto) -> None:
    """Remove nodes that no output depends on, initializers that no node reads, and shapes of removed tensors, in place;
    inputs stay."""
    needed = {value.name for value in model.graph.output}
    kept = []
    for node in reversed(model.graph.node):
        if not needed.isdisjoint(node.output):
            kept.append(node)
            needed |= inputs_of(node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(kept))
    tensors = [tensor for tensor in model.graph.initializer if tensor.name in needed]
    del model.graph.initializer[:]
    model.graph.initializer.extend(tensors)
    made = {tensor for node in model.graph.node for tensor in node.output}
    shapes = [value for value in model.graph.value_info if value.name in made]
    del model.graph.value_info[:]
    model.graph.value_info.extend(shapes)
    annotated = [one for one in model.graph.quantization_annotation if one.tensor_name in made | needed]
    del model.graph.quantization_annotation[:]
    model.graph.quantization_annotation.extend(annotated)


def inputs_of(node: onnx.NodeProto) -> set[str]:
    """Return what a node reads, including what its nested graphs take from outside."""
    read: set[str] = set()
    made: set[str] = set()
    for attribute in node.attribute:
        inner = [attribute.g] if attribute.HasField("g") else []
        for graph in (*inner, *attribute.graphs):
            for each in nodes.graphs(graph):
                read |= {tensor for inside in each.node for tensor in inside.input if tensor}
                read |= {value.name for value in each.output}
                made |= {tensor for inside in each.node for tensor in inside.output}
                made |= {value.name for value in (*each.input, *each.initializer)}
    # ONNX allows no name of an inner graph that is one of the graphs around it.
    return {tensor for tensor in node.input if tensor} | (read - made)
