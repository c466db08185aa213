"""Prepares a graph for ONNX Runtime's quantizer and float16 converter, and transfers a plan to it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kedge_targets.graph import (
    canonicalization,
    library,
    model_reader,
    node_tracing,
    nodes,
    opsets,
    plan_layers,
    topological_order,
)
from kedge_targets.numerics import Plan, Precision

if TYPE_CHECKING:
    import onnx

QDQ_OPSET = 13
"""First opset in which DequantizeLinear has an axis, so that weights can have per-channel scales."""


def prepare(model: onnx.ModelProto, path: Path, *, quantized: bool) -> onnx.ModelProto:
    """Constants folded, batch normalization and its like fused into the weights, shapes inferred: what
    ``quant_pre_process`` does without its symbolic half, which costs an import of sympy and is of use only for
    operators that cannot be quantized here. That function hides the optimizer's errors, so it is not called.

    Args:
        path: of a file to write on the way; its name stands in messages.
        quantized: whether the graph will be, so that it must have :data:`QDQ_OPSET`.

    Raises:
        UnsupportedOperatorError, ModelError: see :func:`kedge_targets.graph.library.try_to_load`.
    """
    import onnx

    onnxruntime = library.load()
    if quantized:
        single = type(model)()
        single.CopyFrom(opsets.raise_opset(model, QDQ_OPSET, where=path.name))
        canonicalization.convert_to_float32(single)
        # ONNX Runtime folds no DequantizeLinear: the layer behind one would have no weight of its own.
        canonicalization.fold_stored_weights(single)
        model = single
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    # "Basic" is the level that holds for every processor; above it nodes are made for this one.
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    settings.optimized_model_filepath = str(path)
    library.try_to_load(model.SerializeToString(), settings, where=path.name)
    made = onnx.load_model(str(path))
    canonicalization.simplify_gemms(made)
    if quantized:
        canonicalization.split_biases(made)
    nodes.name_nodes(made)
    return model_reader.infer_shapes(made, where=path.name)


def assigned(plan: Plan, given: onnx.ModelProto, made: onnx.ModelProto) -> dict[str, Precision]:
    """Return the precision of each node of the prepared graph ``made``, by name.

    Where a fused node stems from several layers, one that the plan names wins over the default, and of these the
    larger precision.

    Raises:
        LoweringError: the plan names a node that the graph has not.
    """
    plan_layers.others(plan, given, plan.default)
    found = {node.name: plan.default for node in made.graph.node}
    for precision in Precision:
        asked = [name for name, wanted in plan.layers.items() if wanted is precision]
        found |= dict.fromkeys(node_tracing.trace_nodes(asked, given, made), precision)
    return found


def not_of(precision: Precision, plan: Plan, given: onnx.ModelProto, made: onnx.ModelProto) -> list[str]:
    """Return the nodes of the prepared graph ``made`` that the plan wants in a different precision; raises as
    :func:`assigned`."""
    return [name for name, wanted in assigned(plan, given, made).items() if wanted is not precision]


def convert_to_float16(made: onnx.ModelProto, excluded: list[str]) -> onnx.ModelProto:
    """Return the prepared graph in float16 except for these nodes; inputs and outputs keep their types."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    outputs = [type(value).FromString(value.SerializeToString()) for value in made.graph.output]
    given = {value.name for value in made.graph.input}
    # An input that is an output it would cast as an output, before anything makes it.
    computed = [value for value in outputs if value.name not in given]
    del made.graph.output[:]
    made.graph.output.extend(computed)
    half: onnx.ModelProto = convert_float_to_float16(
        made, keep_io_types=True, node_block_list=excluded, disable_shape_infer=True
    )
    del half.graph.output[:]
    half.graph.output.extend(outputs)
    # Where two excluded nodes read one tensor the converter (onnxruntime 1.31) makes the same Cast twice, and it puts
    # every Cast at the end.
    kept = {node.output[0] if node.output else node.name: node for node in half.graph.node}
    nodes = topological_order.sort_nodes(list(kept.values()))
    del half.graph.node[:]
    half.graph.node.extend(nodes)
    return half
