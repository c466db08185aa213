"""Inserts explicit QDQ as TensorRT expects it.

TensorRT fuses a weighted layer with what follows it (Relu, Add, ...) up to the next QuantizeLinear. So only the inputs
of weighted layers are quantized, and the branch of a sum that is not fused into it (NVIDIA, TensorRT documentation,
"Explicit Quantization", recommendations on placing Q/DQ).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from kedge_targets.contract import Calibration
from kedge_targets.graph import attention, qdq_insertion, qdq_placement, ranges
from kedge_targets.numerics import Granularity, QuantizationScheme

if TYPE_CHECKING:
    import onnx

SYMMETRIC = QuantizationScheme(
    activation="int8", weight="int8", symmetric_activation=True, granularity=Granularity.PER_CHANNEL
)
"""The only int8 scheme that TensorRT takes: zero-points are 0 (operators.md, ``x_zero_point must be zero``)."""

FORM = qdq_insertion.QdqForm(how=SYMMETRIC, answers=False, stored=False, biases=False, everywhere=True)
"""QDQ form for TensorRT. The parser refuses integer biases ("DequantizeLinear: input has type Int32"); TensorRT 8's
parser takes no int8 weights, so they are stored in float before their pair."""

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
_SUM = "Add"

# Between two weighted layers these neither compute nor stop int8: Q and DQ are moved across them, or they are fused
# into the layer before them.
_FUSED = frozenset({
    "Add", "Cast", "Clip", "Concat", "Constant", "ConstantOfShape", "DequantizeLinear", "Expand", "Flatten", "Gather",
    "Identity", "LeakyRelu", "MaxPool", "Mul", "Pad", "QuantizeLinear", "Relu", "Reshape", "Shape", "Sigmoid", "Slice",
    "Split", "Squeeze", "Transpose", "Unsqueeze", *WEIGHTED,
})  # fmt: skip


def quantize_graph(
    prepared: onnx.ModelProto,
    excluded: list[str],
    calibration: Calibration,
    known: Mapping[str, tuple[float, float]],
) -> tuple[onnx.ModelProto, float]:
    """Return the prepared graph with Q/DQ pairs, and the seconds that this took.

    Args:
        excluded: nodes that stay in float.
        known: fixed ranges; calibration finds the others.
    """
    start = time.perf_counter()
    floating = {*excluded, *attention.before_softmax(prepared), *_other_sums(prepared)}
    where = qdq_placement.place_quantizers(prepared, {*WEIGHTED, _SUM}, floating, answers=False)
    wanted = qdq_insertion.tensors_to_observe(prepared, where)
    missing = [name for name in wanted if name not in known]
    found = {**known, **(ranges.observe(prepared, calibration, missing, symmetric=True) if missing else {})}
    made = qdq_insertion.insert_qdq(prepared, where, found, FORM)
    free_sums(made)
    return made, time.perf_counter() - start


def _other_sums(model: onnx.ModelProto) -> list[str]:
    """Return the sums that are not fused into a convolution: of a bias, of positions, in attention. They stay in
    float."""
    constants = {tensor.name for tensor in model.graph.initializer}
    maker = {tensor: node.op_type for node in model.graph.node for tensor in node.output}
    return [
        node.name
        for node in model.graph.node
        if node.op_type == _SUM
        and (set(node.input) & constants or not any(maker.get(tensor) in _CONVOLUTIONS for tensor in node.input))
    ]


def free_sums(model: onnx.ModelProto) -> None:
    """Leave one branch of a quantized sum in float, in place: the convolution that TensorRT fuses the sum into. Of two
    convolutions that is the one at the end of the longer branch."""
    maker = {tensor: node for node in model.graph.node for tensor in node.output}
    users: dict[str, int] = {}
    for node in model.graph.node:
        for tensor in node.input:
            users[tensor] = users.get(tensor, 0) + 1
    depth = _depths(model)
    for node in model.graph.node:
        if node.op_type != _SUM:
            continue
        free = [
            (depth[source.name], index, down.input[0])
            for index, tensor in enumerate(node.input)
            if (down := _pair(maker, tensor)) is not None
            and users[tensor] == 1
            and users[down.input[0]] == 1
            and (source := maker.get(down.input[0])) is not None
            and source.op_type in _CONVOLUTIONS
        ]
        if free:
            _, index, tensor = max(free)
            node.input[index] = tensor
    _drop_unused(model)


def _pair(maker: dict[str, onnx.NodeProto], tensor: str) -> onnx.NodeProto | None:
    """Return the QuantizeLinear of the pair that produces a tensor."""
    up = maker.get(tensor)
    down = maker.get(up.input[0]) if up is not None and up.op_type == "DequantizeLinear" else None
    return down if down is not None and down.op_type == "QuantizeLinear" else None


def _depths(model: onnx.ModelProto) -> dict[str, int]:
    """Return node → its position on the longest path to it; nodes are in topological order."""
    of_tensor: dict[str, int] = {}
    of_node: dict[str, int] = {}
    for node in model.graph.node:
        of_node[node.name] = 1 + max((of_tensor.get(tensor, 0) for tensor in node.input), default=0)
        of_tensor |= dict.fromkeys(node.output, of_node[node.name])
    return of_node


def _drop_unused(model: onnx.ModelProto) -> None:
    """Remove unused pairs, and then unused constants."""
    outputs = {value.name for value in model.graph.output}
    while True:
        used = outputs | {tensor for node in model.graph.node for tensor in node.input}
        idle = [
            node
            for node in model.graph.node
            if node.op_type in ("QuantizeLinear", "DequantizeLinear") and not used & set(node.output)
        ]
        if not idle:
            break
        for node in idle:
            model.graph.node.remove(node)
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def notes(model: onnx.ModelProto) -> list[str]:
    """Describe which parts of a quantized graph do not run in int8."""
    maker = {tensor: node for node in model.graph.node for tensor in node.output}
    weighted = [node for node in model.graph.node if node.op_type in WEIGHTED]
    in_float = [node.name for node in weighted if _pair(maker, node.input[0]) is None]
    made = []
    if in_float:
        made.append(f"{len(in_float)} of {len(weighted)} weighted layers stay in float: {', '.join(in_float[:5])}")
    quantized_next = {node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    breaking = [node for node in model.graph.node if node.op_type not in _FUSED and quantized_next & set(node.output)]
    if breaking:
        kinds = ", ".join(sorted({node.op_type for node in breaking}))
        made.append(f"{len(breaking)} nodes between int8 layers compute in float and stop their fusion: {kinds}")
    return made
