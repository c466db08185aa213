"""ONNX Runtime's quantizer: int8 with ranges of activations from calibration, or found in each call."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedge_protocol.errors import LoweringError
from kedge_targets.contract import Array, Calibration
from kedge_targets.graph import batch, passes, ranges
from kedge_targets.graph.samples import Samples
from kedge_targets.numerics import Granularity, Plan, QuantizedType, RangeMethod

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
    prepared: onnx.ModelProto,
    plan: Plan,
    how: QuantizedType,
    excluded: list[str],
    calibration: Calibration,
    workdir: Path,
) -> tuple[onnx.ModelProto, float, int]:
    """The prepared graph with QuantizeLinear and DequantizeLinear around its integer layers.

    Args:
        excluded: names of nodes that stay in float.
        workdir: for files on the way.

    Returns:
        The graph, seconds, calibration samples used.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    types = {"int8": QuantType.QInt8, "uint8": QuantType.QUInt8}
    start = time.perf_counter()
    fixed = dict(plan.ranges)
    every = Samples(calibration, batch.size(prepared))
    samples: Samples | _First = every
    used = None
    if plan.range_method is not RangeMethod.MIN_MAX:
        fixed = _observed(prepared, plan, how, excluded, calibration) | fixed
        used = calibration.samples
        # Every range is known: the quantizer's own search shall cost nothing.
        samples = _First(every)
    add_pre_process_metadata(prepared)
    source, made = workdir / "prepared.onnx", workdir / "quantized.onnx"
    onnx.save_model(prepared, str(source))
    quantize_static(
        source,
        made,
        samples,
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=list(INTEGER_OPERATORS),
        per_channel=how.granularity is Granularity.PER_CHANNEL,
        reduce_range=how.reduced_range,
        activation_type=types[how.activation],
        weight_type=types[how.weight],
        nodes_to_exclude=excluded,
        # Of its methods the one that holds nothing in memory, and that every graph stands: histograms burst on a
        # mask's minus infinity. The other methods are Kedge's own.
        calibrate_method=CalibrationMethod.MinMax,
        extra_options={
            "ActivationSymmetric": how.symmetric_activation,
            "WeightSymmetric": how.weight == "int8",
            "TensorQuantOverrides": _overrides(prepared, fixed),
        },
    )
    seconds = time.perf_counter() - start
    quantized = onnx.load_model(str(made))
    passes.free_answers(quantized)
    return quantized, seconds, samples.used if used is None else used


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


def _observed(
    prepared: onnx.ModelProto, plan: Plan, how: QuantizedType, excluded: list[str], calibration: Calibration
) -> dict[str, tuple[float, float]]:
    """Ranges of all activations that the quantizer will ask for, by the plan's method."""
    constants = {tensor.name for tensor in prepared.graph.initializer}
    floats = _floats(prepared)
    wanted = {
        tensor: None
        for node in prepared.graph.node
        if node.op_type in INTEGER_OPERATORS and node.name not in set(excluded)
        for tensor in (*node.input, *node.output)
        if tensor in floats and tensor not in constants
    }
    return ranges.observe(
        prepared,
        calibration,
        list(wanted),
        method=plan.range_method,
        percentile=plan.percentile,
        symmetric=how.symmetric_activation,
    )


def _floats(model: onnx.ModelProto) -> set[str]:
    """Names of the tensors that are known to be float32."""
    import onnx

    values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    return {value.name for value in values if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}


def _overrides(prepared: onnx.ModelProto, fixed: dict[str, tuple[float, float]]) -> dict[str, list[dict[str, Any]]]:
    """Ranges as the quantizer takes them. A Relu or Clip that only cuts off is left out of the integer graph, so what
    goes in has the range of what comes out."""
    import numpy as np

    readers: dict[str, int] = {}
    for node in prepared.graph.node:
        for tensor in node.input:
            readers[tensor] = readers.get(tensor, 0) + 1
    decided = dict(fixed)
    for node in prepared.graph.node:
        cut = node.op_type in ("Relu", "Clip") and node.output[0] in fixed
        if cut and readers[node.input[0]] == 1:
            decided[node.input[0]] = fixed[node.output[0]]
    known = {tensor for node in prepared.graph.node for tensor in (*node.input, *node.output)}
    known -= {tensor.name for tensor in prepared.graph.initializer}
    return {
        name: [{"rmin": np.array(low, np.float32), "rmax": np.array(high, np.float32)}]
        for name, (low, high) in decided.items()
        if name in known
    }


class _First:
    """The first batch of some."""

    def __init__(self, samples: Samples) -> None:
        self._batch: dict[str, Array] | None = samples.get_next()
        self.used = 0

    def get_next(self) -> dict[str, Array] | None:
        """What ``CalibrationDataReader`` asks for."""
        batch, self._batch = self._batch, None
        return batch
