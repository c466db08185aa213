"""Quantizes to int8 for ONNX Runtime, with activation ranges from calibration or found in each call."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kedge_protocol.errors import LoweringError
from kedge_targets.contract import Calibration
from kedge_targets.graph import (
    concat_scales,
    float_regions,
    output_guard,
    qdq_insertion,
    qdq_placement,
    ranges,
    split_gemm,
)
from kedge_targets.numerics import Plan, QuantizationScheme

if TYPE_CHECKING:
    import onnx

# What ONNX Runtime's CPU kernels compute in integers when it stands between DequantizeLinear and QuantizeLinear
# (its QDQ selectors). All else is left in float rather than rounded for nothing; so is Softmax, whose integer form
# is no faster and gives answers in steps of 1/256.
INTEGER_OPERATORS = (
    "Add", "ArgMax", "AveragePool", "Clip", "Concat", "Conv", "Flatten", "Gather", "Gemm", "GlobalAveragePool",
    "LeakyRelu", "MatMul", "MaxPool", "Mul", "Relu", "Reshape", "Resize", "Sigmoid", "Slice", "Split", "Squeeze",
    "Transpose", "Unsqueeze", "Where",
)  # fmt: skip

DYNAMIC_OPERATORS = ("Gather", "MatMul")
"""Operators with integer kernels that find the range of their input in each call; a Gather is an embedding table.
ConvInteger is slower than a convolution in float."""


@dataclass(frozen=True)
class Static:
    """A statically quantized graph.

    Attributes:
        model: graph with QuantizeLinear and DequantizeLinear around its integer layers.
        kept: nodes that stay in float because an output would not be accurate enough otherwise.
        weak: those outputs → dB with these nodes in integers.
    """

    model: onnx.ModelProto
    kept: tuple[str, ...]
    weak: dict[str, float]


def static(
    prepared: onnx.ModelProto, plan: Plan, how: QuantizationScheme, must: Collection[str], calibration: Calibration
) -> Static:
    """Quantize the prepared graph with the ranges that calibration observed.

    Args:
        must: names of nodes that stay in float.
    """
    found: dict[str, tuple[float, float]] = dict(plan.ranges)
    if not found:  # ranges that were learnt are of the graph as it is
        prepared = concat_scales.even_out(prepared, calibration)

    def made(more: Collection[str]) -> onnx.ModelProto:
        floating = float_regions.extend_float_regions(prepared, {*must, *more}, INTEGER_OPERATORS)
        where = qdq_placement.place_quantizers(prepared, INTEGER_OPERATORS, floating)
        missing = [name for name in qdq_insertion.tensors_to_observe(prepared, where) if name not in found]
        if missing:
            found.update(
                ranges.observe(
                    prepared,
                    calibration,
                    missing,
                    method=plan.range_method,
                    percentile=plan.percentile,
                    symmetric=how.symmetric_activation,
                    beyond=how.reaches_further(guard=plan.guard),
                )
            )
        return qdq_insertion.insert_qdq(prepared, where, found, qdq_insertion.QdqForm(how=how))

    if not plan.guard:
        return Static(made(()), (), {})
    return Static(*output_guard.apply_guard(prepared, output_guard.few(prepared, calibration), made))


def dynamic(
    prepared: onnx.ModelProto, excluded: list[str], workdir: Path, *, reduced_range: bool
) -> tuple[onnx.ModelProto, float]:
    """Return the prepared graph with MatMulInteger for its products with a constant, and the seconds that this took.

    Args:
        excluded: names of nodes that stay in float.
        workdir: folder for intermediate files.
        reduced_range: limit weights to 7 bits.

    Raises:
        LoweringError: the graph has no such product.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    start = time.perf_counter()
    split_gemm.split_gemm(prepared)
    source, made = workdir / "prepared.onnx", workdir / "quantized.onnx"
    onnx.save_model(prepared, str(source))
    quantize_dynamic(
        source,
        made,
        op_types_to_quantize=list(DYNAMIC_OPERATORS),
        per_channel=True,
        reduce_range=reduced_range,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=excluded,
        extra_options={"MatMulConstBOnly": True},
    )
    seconds = time.perf_counter() - start
    quantized = onnx.load_model(str(made))
    if all(node.op_type != "MatMulInteger" for node in quantized.graph.node):
        raise LoweringError(
            "no layer has an integer form with ranges that are found in each call",
            remedy="Take int8 with calibration; only products with a constant matrix (MatMul, Gemm) have this form",
        )
    return quantized, seconds
