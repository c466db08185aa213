"""Lowering for ONNX Runtime: static QDQ int8, float16 weights and activations, or the graph itself."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedge_protocol.bundle.config import RuntimeRequirement, Verified
from kedge_protocol.errors import KedgeError, LoweringError, TargetError
from kedge_targets import contract
from kedge_targets.contract import Calibration, Lowered
from kedge_targets.graph import (
    attention,
    batch,
    library,
    nodes,
    opsets,
    passes,
    plans,
    preparing,
    reading,
    signature,
    writing,
)
from kedge_targets.graph.samples import Samples
from kedge_targets.numerics import Granularity, Numerics, Plan, Precision, QuantizedType
from kedge_targets.saturation import FULL_RANGE, SEVEN_BITS, may_saturate
from kedge_targets.target import Target

if TYPE_CHECKING:
    import onnx

ENTRY = "model.onnx"

_SIGNED = QuantizedType(
    activation="int8", weight="int8", symmetric_activation=False, granularity=Granularity.PER_CHANNEL
)

# What ONNX Runtime's CPU kernels compute in integers when it stands between DequantizeLinear and QuantizeLinear
# (its QDQ selectors). All else is left in float rather than rounded for nothing; so is Softmax, whose integer form
# is no faster and gives answers in steps of 1/256.
INTEGER_OPERATORS = (
    "Add", "ArgMax", "AveragePool", "Clip", "Concat", "Conv", "Flatten", "Gather", "Gemm", "GlobalAveragePool",
    "LeakyRelu", "MatMul", "MaxPool", "Mul", "Relu", "Reshape", "Resize", "Sigmoid", "Slice", "Split", "Squeeze",
    "Transpose", "Unsqueeze", "Where",
)  # fmt: skip

# The first ONNX Runtime that takes an opset, found by giving models to 1.20 to 1.31.
_FIRST_RUNTIME = {21: "1.20", 22: "1.21", 23: "1.23", 25: "1.24", 26: "1.25"}

_KNOWN_OPTIONS = frozenset({"threads", "spin"})


class Compiler(contract.Compiler):
    """ONNX Runtime's quantizer and float16 converter.

    Options of a target's file:
        threads, spin: see :class:`kedge_targets.backends.onnxruntime.runtime.Runtime`.
    """

    @property
    def numerics(self) -> Numerics:
        """See :meth:`kedge_targets.contract.Compiler.numerics`."""
        return Numerics(
            precisions=(Precision.INT8, Precision.FLOAT16, Precision.FLOAT32),
            quantized=(FULL_RANGE, SEVEN_BITS, _SIGNED),
            mixed=True,
            layouts=("NCHW",),
        )

    def missing(self) -> str | None:
        """See :meth:`kedge_targets.contract.Compiler.missing`."""
        from importlib.util import find_spec

        absent = [name for name in ("onnx", "onnxruntime") if find_spec(name) is None]
        return f'{absent[0]} is missing: pip install "kedge[compile]"' if absent else None

    def verification(self, target: Target) -> Verified:
        """See :meth:`kedge_targets.contract.Compiler.verification`."""
        return Verified.EXECUTED

    def quantized_for(self, target: Target) -> tuple[QuantizedType, ...]:
        """See :meth:`kedge_targets.contract.Compiler.quantized_for`."""
        if may_saturate(target.processor):
            return (SEVEN_BITS,)
        return (FULL_RANGE, SEVEN_BITS) if target.processor.architecture == "x86_64" else (FULL_RANGE, _SIGNED)

    def lower(
        self,
        graph: Path,
        plan: Plan,
        calibration: Calibration,
        *,
        target: Target,
        options: Mapping[str, Any],
        workdir: Path,
    ) -> Lowered:
        """See :meth:`kedge_targets.contract.Compiler.lower`."""
        _check_options(options, target)
        try:
            return _lower(self, graph, plan, calibration, target=target, options=options, workdir=workdir)
        except KedgeError:
            raise
        except Exception as error:  # what the vendor's packages raise has no common base
            raise LoweringError(
                f"ONNX Runtime's tools failed: {type(error).__name__}: {library.reason_of(error)}", where=graph.name
            ) from error


def _lower(
    compiler: Compiler,
    graph: Path,
    plan: Plan,
    calibration: Calibration,
    *,
    target: Target,
    options: Mapping[str, Any],
    workdir: Path,
) -> Lowered:
    import onnx

    onnxruntime = library.load()
    given = reading.load(graph)
    nodes.check_operators(given, where=graph.name)
    precision = plans.leading(plan)
    prepared = preparing.prepared(given, workdir / "prepared.onnx", quantized=precision is Precision.INT8)
    seconds: dict[str, float] = {}
    used = 0
    runtime_options = {name: options[name] for name in ("threads", "spin") if name in options}
    if precision is Precision.INT8:
        if not calibration.samples:
            raise LoweringError("there are no calibration samples", remedy="Give at least one; some hundred are usual")
        how = plan.quantized or compiler.quantized_for(target)[0]
        excluded = preparing.not_of(Precision.INT8, plan, given, prepared) + attention.before_softmax(prepared)
        samples = Samples(calibration, batch.size(prepared))
        made, seconds["quantize"] = _quantized(prepared, how, excluded, samples, workdir)
        used = samples.used
    elif precision is Precision.FLOAT16:
        made = preparing.halved(prepared, preparing.not_of(Precision.FLOAT16, plan, given, prepared))
    else:
        made = prepared
    # Of a transformer in float16 ONNX Runtime (1.23 to 1.31) needs the inferred shapes: without them its optimizer
    # crashes on an Add before a LayerNormalization.
    writing.strip(made, keep_shapes=precision is Precision.FLOAT16)
    entry = workdir / ENTRY
    writing.save(made, entry)
    layouts = {info.name: info.layout for info in signature.inputs(given)}
    inputs = signature.specs(signature.inputs(made), layouts=layouts)
    return Lowered(
        files={ENTRY: entry},
        entry=ENTRY,
        inputs=inputs,
        outputs=signature.specs(signature.outputs(made)),
        runtimes=(RuntimeRequirement(distribution="onnxruntime", minimum=_first_runtime(made, target)),),
        verified=Verified.EXECUTED,
        tools={"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__},
        runtime_options=runtime_options,
        seconds=seconds,
        calibration_samples=used,
    )


def _quantized(
    prepared: onnx.ModelProto,
    how: QuantizedType,
    excluded: list[str],
    samples: Samples,
    workdir: Path,
) -> tuple[onnx.ModelProto, float]:
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    types = {"int8": QuantType.QInt8, "uint8": QuantType.QUInt8}
    add_pre_process_metadata(prepared)
    source, made = workdir / "prepared.onnx", workdir / "quantized.onnx"
    onnx.save_model(prepared, str(source))
    start = time.perf_counter()
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
        # mask's minus infinity. What percentiles gained on ic_resnet8 they lost on kws_dscnn.
        calibrate_method=CalibrationMethod.MinMax,
        extra_options={
            "ActivationSymmetric": how.symmetric_activation,
            "WeightSymmetric": how.weight == "int8",
        },
    )
    seconds = time.perf_counter() - start
    quantized = onnx.load_model(str(made))
    passes.free_answers(quantized)
    return quantized, seconds


def _first_runtime(model: onnx.ModelProto, target: Target) -> str:
    version = opsets.version(model)
    first = next((runtime for opset, runtime in _FIRST_RUNTIME.items() if version <= opset), None)
    has = target.runtimes.get("onnxruntime")
    if first is None or (has is not None and _numbers(has) < _numbers(first)):
        raise LoweringError(
            f"opset {version} needs ONNX Runtime {first or 'newer than is known here'}, "
            f"target {target.name} has {has or 'none stated'}",
            remedy=f"Export the model with opset {min(_FIRST_RUNTIME)} or lower",
        )
    return first


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _check_options(options: Mapping[str, Any], target: Target) -> None:
    where = f"target {target.name}, options"
    if unknown := sorted(set(options) - _KNOWN_OPTIONS):
        raise TargetError(f"unknown option {unknown[0]!r}", where=where, remedy=f"Known are {sorted(_KNOWN_OPTIONS)}")
