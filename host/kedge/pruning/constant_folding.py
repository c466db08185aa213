"""Constant folding: whatever a graph computes from weights alone becomes a weight, so that it can be cut."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kedge.pruning import inference_session

if TYPE_CHECKING:
    import onnx

# Not the same each time, or the very form that a quantized weight is stored in.
_LEFT_ALONE = frozenset({
    "RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli",
    "QuantizeLinear", "DequantizeLinear",
})  # fmt: skip
_STANDARD = ("", "ai.onnx")


def fold_constants(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which ``Constant`` nodes, and nodes that read only constants, are replaced by initializers under
    the names of their outputs. Initializers are no longer listed as inputs, and unread ones are removed.

    Raises:
        UnsupportedOperatorError, ModelError: ONNX Runtime cannot compute a constant.
    """
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    known = {tensor.name for tensor in graph.initializer}
    kept = [value for value in graph.input if value.name not in known]
    del graph.input[:]
    graph.input.extend(kept)
    answers = {value.name for value in graph.output}
    constant: list[onnx.NodeProto] = []
    rest: list[onnx.NodeProto] = []
    for node in graph.node:
        # An answer that is constant stays as it is: an initializer cannot be an output for every runtime.
        if _foldable(node) and known.issuperset(filter(None, node.input)) and not answers.intersection(node.output):
            constant.append(node)
            known.update(filter(None, node.output))
        else:
            rest.append(node)
    if constant:
        made = _computed(copy, constant)
        graph.initializer.extend(made)
        nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in rest]
        del graph.node[:]
        graph.node.extend(nodes)
    drop_unread(copy)
    return copy


def drop_unread(model: onnx.ModelProto) -> None:
    """Remove the initializers that nothing reads, in place."""
    from kedge_targets.graph import nodes

    graph = model.graph
    read = {name for inner in nodes.graphs(graph) for node in inner.node for name in node.input}
    read |= {value.name for inner in nodes.graphs(graph) for value in inner.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    if len(kept) < len(graph.initializer):
        del graph.initializer[:]
        graph.initializer.extend(kept)


def _foldable(node: onnx.NodeProto) -> bool:
    has_graph = any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)
    return node.domain in _STANDARD and node.op_type not in _LEFT_ALONE and not has_graph


def _computed(model: onnx.ModelProto, constant: list[onnx.NodeProto]) -> list[onnx.TensorProto]:
    import onnx
    from onnx import numpy_helper

    names = [name for node in constant for name in node.output if name]
    needed = {name for node in constant for name in node.input}
    graph = onnx.helper.make_graph(
        constant,
        "constants",
        [],
        [onnx.ValueInfoProto(name=name) for name in names],
        [tensor for tensor in model.graph.initializer if tensor.name in needed],
    )
    probe = onnx.helper.make_model(graph, ir_version=min(model.ir_version, 10), opset_imports=model.opset_import)
    session = inference_session.session(probe, where="the constants of the graph")
    return [numpy_helper.from_array(value, name) for name, value in zip(names, session.run(names, {}), strict=True)]
