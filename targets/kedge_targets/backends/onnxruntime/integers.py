"""int8 for ONNX Runtime: with ranges of activations from calibration, or found in each call."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from kedge_protocol.errors import LoweringError
from kedge_targets.contract import Calibration
from kedge_targets.graph import passes, places, qdq, ranges
from kedge_targets.graph.places import Places
from kedge_targets.numerics import Plan, QuantizedType

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
"""Those with integer kernels that find the range of their input in each call; a Gather is a table of embeddings.
ConvInteger is slower than a convolution in float."""


def static(
    prepared: onnx.ModelProto, plan: Plan, how: QuantizedType, floating: list[str], calibration: Calibration
) -> tuple[onnx.ModelProto, Places]:
    """The prepared graph with QuantizeLinear and DequantizeLinear around its integer layers, and what they are.

    Args:
        floating: names of nodes that stay in float.
    """
    where = places.placed(prepared, INTEGER_OPERATORS, floating)
    names = qdq.wanted(prepared, where)
    fixed = {name: plan.ranges[name] for name in names if name in plan.ranges}
    found = ranges.observe(
        prepared,
        calibration,
        [name for name in names if name not in fixed],
        method=plan.range_method,
        percentile=plan.percentile,
        symmetric=how.symmetric_activation,
    )
    return qdq.written(prepared, where, found | fixed, qdq.Form(how=how)), where


def dynamic(
    prepared: onnx.ModelProto, excluded: list[str], workdir: Path, *, reduced_range: bool
) -> tuple[onnx.ModelProto, float]:
    """The prepared graph with MatMulInteger for its products with a constant; also the seconds that it took.

    Args:
        excluded: names of nodes that stay in float.
        workdir: for files on the way.
        reduced_range: weights of 7 bits.

    Raises:
        LoweringError: the graph has nothing for it.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    start = time.perf_counter()
    passes.split_gemm(prepared)
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
