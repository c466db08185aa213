"""Lowers models for ONNX Runtime: int8 with calibrated or dynamic ranges, weight-only quantization, float16, or the
graph itself."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kedge_protocol.bundle.config import RuntimeRequirement, Verified
from kedge_protocol.errors import LoweringError
from kedge_protocol.packages import version_numbers
from kedge_targets.backends.onnxruntime import barriers, gelu, int8, integer_products, softmax
from kedge_targets.compiler_template import CompilerTemplate, LoweringJob
from kedge_targets.contract import Lowered
from kedge_targets.graph import (
    attention,
    batch,
    branches,
    canonicalization,
    counting,
    deduplication,
    float_regions,
    gptq,
    integer_operators,
    layers,
    library,
    model_reader,
    model_writer,
    node_tracing,
    nodes,
    opsets,
    output_guard,
    plan_layers,
    qdq_insertion,
    quantizer_preparation,
    signature,
    weight_dequantization,
)
from kedge_targets.graph.calibration_reader import Samples
from kedge_targets.integer_saturation import FULL_RANGE, SEVEN_BITS, may_saturate
from kedge_targets.numerics import (
    Family,
    Granularity,
    Numerics,
    Plan,
    Precision,
    QuantizationScheme,
    RangeMethod,
    Reach,
)
from kedge_targets.target import Target
from kedge_targets.true_precision import Numbers

if TYPE_CHECKING:
    import onnx

    from kedge_targets.decoder.contract import DecoderCompiler

ENTRY = "model.onnx"

# The right side of a product of two activations is packed anew in each call, and its kernel is not the fast one: in
# integers attention is no faster than in float, and worse.
_FULL_RANGE = replace(FULL_RANGE, products=False, reach=Reach.FURTHER)
_SEVEN_BITS = replace(SEVEN_BITS, products=False, reach=Reach.FURTHER)
_SIGNED = QuantizationScheme(
    activation="int8",
    weight="int8",
    symmetric_activation=False,
    granularity=Granularity.PER_CHANNEL,
    products=False,
    reach=Reach.FURTHER,
)

# What is offered to a search beside what is usual.
_OTHERS = (
    replace(_FULL_RANGE, products=True),
    replace(_SEVEN_BITS, products=True),
    replace(_SIGNED, products=True),
    replace(_FULL_RANGE, granularity=Granularity.PER_TENSOR),
    replace(_SEVEN_BITS, granularity=Granularity.PER_TENSOR),
    replace(_SIGNED, symmetric_activation=True),
    replace(_SIGNED, granularity=Granularity.PER_TENSOR),
    replace(_SIGNED, symmetric_activation=True, granularity=Granularity.PER_TENSOR),
)

# The first ONNX Runtime that takes an opset, found by giving models to 1.20 to 1.31.
_FIRST_RUNTIME = {21: "1.20", 22: "1.21", 23: "1.23", 25: "1.24", 26: "1.25"}

_KNOWN_OPTIONS = frozenset({"threads", "spin"})


class Compiler(CompilerTemplate):
    """Compiles with ONNX Runtime's quantizer and float16 converter.

    Options of a target's file:
        threads, spin: see :class:`kedge_targets.backends.onnxruntime.runtime.Runtime`.
    """

    tools = "ONNX Runtime's tools"
    modules = ("onnx", "onnxruntime")
    known_options = _KNOWN_OPTIONS
    reference = True
    texts = True

    @property
    def numerics(self) -> Numerics:
        """See :meth:`kedge_targets.contract.Compiler.numerics`."""
        return Numerics(
            precisions=(
                *(precision for precision in Precision if precision.family is Family.WEIGHTS),
                Precision.INT8,
                Precision.INT8_DYNAMIC,
                Precision.FLOAT16,
                Precision.FLOAT32,
            ),
            schemes=(_FULL_RANGE, _SEVEN_BITS, _SIGNED, *_OTHERS),
            mixed=True,
            layouts=("NCHW",),
            range_methods=tuple(RangeMethod),
            fixed_ranges=True,
        )

    def decoders(self) -> DecoderCompiler:
        """See :meth:`kedge_targets.contract.Compiler.decoders`."""
        from kedge_targets.backends.onnxruntime.decoder.compiler import Compiler as Decoders

        return Decoders()

    def verification(self, target: Target) -> Verified:
        """See :meth:`kedge_targets.contract.Compiler.verification`."""
        return Verified.EXECUTED

    def quantized_for(self, target: Target) -> tuple[QuantizationScheme, ...]:
        """See :meth:`kedge_targets.contract.Compiler.quantized_for`."""
        if may_saturate(target.processor):
            return (_SEVEN_BITS,)
        x86 = target.processor.architecture == "x86_64"
        return (_FULL_RANGE, _SEVEN_BITS if x86 else _SIGNED)

    def lower_job(self, job: LoweringJob) -> Lowered:
        """See :meth:`kedge_targets.compiler_template.CompilerTemplate.lower_job`."""
        import onnx

        onnxruntime = library.load()
        given = _runnable(model_reader.load(job.graph), job.target)
        nodes.check_operators(given, where=job.graph.name)
        made = _lowered(given, self.quantized_for(job.target)[0], job)
        softmax.join_axes_behind(made.model)
        # Of a transformer in float16 ONNX Runtime (1.23 to 1.31) needs the inferred shapes: without them its optimizer
        # crashes on an Add before a LayerNormalization.
        precision = plan_layers.leading(job.plan)
        model_writer.strip(made.model, keep_shapes=precision is Precision.FLOAT16)
        if precision.quantized:
            deduplication.share_constants(made.model)
            deduplication.shorten_names(made.model)
        entry = job.workdir / ENTRY
        model_writer.save(made.model, entry)
        layouts = {info.name: info.layout for info in signature.inputs(given)}
        return Lowered(
            files={ENTRY: entry},
            entry=ENTRY,
            inputs=signature.specs(signature.inputs(made.model), layouts=layouts),
            outputs=signature.specs(signature.outputs(made.model)),
            runtimes=(RuntimeRequirement(distribution="onnxruntime", minimum=_first_runtime(made.model, job.target)),),
            verified=Verified.EXECUTED,
            tools={"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__},
            runtime_options={name: job.options[name] for name in ("threads", "spin") if name in job.options},
            seconds={} if made.seconds is None else {"quantize": made.seconds},
            calibration_samples=made.samples,
            notes=made.notes,
            floating=made.floating,
        )

    def numbers(self, files: Mapping[str, Path], shapes: Mapping[str, Sequence[int]]) -> Numbers | None:
        """See :meth:`kedge_targets.contract.Compiler.numbers`. A convolution is computed in integers only if its output
        is quantized too; a matrix product may have a float output."""
        return counting.numbers(
            model_reader.load(files[ENTRY]),
            shapes,
            integer_operators=("Conv", "Gemm", "MatMul"),
            rounded_answers=("Conv",),
        )


@dataclass(frozen=True, kw_only=True)
class _Made:
    """The graph that goes into the file.

    Attributes:
        seconds: duration of quantization; None if there was nothing to quantize.
        samples: number of calibration samples used.
        floating: layers that stay in float although the plan does not name them.
    """

    model: onnx.ModelProto
    seconds: float | None = None
    samples: int = 0
    notes: tuple[str, ...] = ()
    floating: tuple[str, ...] = ()


def _lowered(given: onnx.ModelProto, usual: QuantizationScheme, job: LoweringJob) -> _Made:
    plan, precision = job.plan, plan_layers.leading(job.plan)
    # Preparing such files would fold what they store small into weights of two or four times the bytes.
    already = precision in (Precision.INT8, Precision.FLOAT32) and qdq_insertion.has_qdq(given)
    if already:
        return _Made(model=given, notes=(qdq_insertion.ALREADY,))
    if (precision is Precision.FLOAT32 and canonicalization.stores_small(given)) or (
        precision is Precision.FLOAT16 and canonicalization.is_half(given)
    ):
        return _Made(model=given)
    prepared = quantizer_preparation.prepare(given, job.workdir / "prepared.onnx", quantized=precision.quantized)
    kept = quantizer_preparation.not_of(precision, plan, given, prepared)
    if precision is Precision.INT8:
        job.require_samples()
        return _static(given, prepared, kept, plan.scheme or usual, job)
    if precision is Precision.INT8_DYNAMIC:
        reduced = may_saturate(job.target.processor)
        made, seconds = int8.dynamic(prepared, kept, job.workdir, reduced_range=reduced)
        return _Made(model=made, seconds=seconds)
    if precision.family is Family.WEIGHTS:
        return _stored_small(given, prepared, job)
    if precision is Precision.FLOAT16:
        return _Made(model=quantizer_preparation.convert_to_float16(prepared, kept))
    return _Made(model=prepared)


def _static(
    given: onnx.ModelProto, prepared: onnx.ModelProto, kept: Sequence[str], how: QuantizationScheme, job: LoweringJob
) -> _Made:
    """Quantize to int8 with ranges from calibration."""
    notes: tuple[str, ...] = ()
    apart = () if how.products else _unnamed_products(given, job.plan)
    if apart:
        notes = (f"{len(apart)} products of two activations (attention) stay in float: integers are no faster",)
    deciding = branches.deciding(given)
    notes += branches.note(deciding)
    apart += tuple(one.name for one in layers.layers(given) if one.name in deciding and one.name not in apart)
    floating = node_tracing.trace_nodes([*apart, *deciding], given, prepared)
    must = {*kept, *floating, *attention.before_softmax(prepared)}
    start = time.perf_counter()
    static = int8.static(prepared, job.plan, how, must, job.calibration)
    seconds = time.perf_counter() - start
    made = static.model
    if any(node.op_type in integer_operators.INTEGER_OPERATORS for node in given.graph.node):
        notes += (qdq_insertion.ALREADY,)
    if static.kept:
        notes += (output_guard.note(static.kept, static.weak),)
        apart += tuple(one.name for one in layers.layers(given) if one.name in static.kept)
    float_regions.pick_before_reading_back(made)
    integer_products.without_masks(made)
    integer_products.with_biases(made)
    gelu.by_tanh(made)
    barriers.insert(made)
    return _Made(model=made, seconds=seconds, samples=job.calibration.samples, notes=notes, floating=apart)


def _stored_small(given: onnx.ModelProto, prepared: onnx.ModelProto, job: LoweringJob) -> _Made:
    """Store weights in few bits; the computation is in float."""
    start = time.perf_counter()
    precisions = quantizer_preparation.assigned(job.plan, given, prepared)
    samples = Samples(job.calibration, batch.size(prepared))
    made = weight_dequantization.store_weights(
        prepared,
        precisions,
        group_size=job.plan.group_size,
        asymmetric=job.plan.asymmetric_weights,
        products=gptq.products(prepared, samples.batches(), precisions) if job.calibration.samples else {},
    )
    return _Made(model=made, seconds=time.perf_counter() - start, samples=samples.used)


def _unnamed_products(model: onnx.ModelProto, plan: Plan) -> tuple[str, ...]:
    """Return the products of two activations that the plan does not name."""
    return tuple(one.name for one in layers.layers(model) if one.weight is None and one.name not in plan.layers)


def _runnable(model: onnx.ModelProto, target: Target) -> onnx.ModelProto:
    """Return the model in the newest opset that the target's ONNX Runtime has, if its own is newer: it often differs
    only in types of numbers.

    Raises:
        LoweringError: its operators are others there.
    """
    has = target.runtimes.get("onnxruntime")
    if has is None:
        return model
    runs = [opset for opset, first in _FIRST_RUNTIME.items() if version_numbers(first)[:3] <= version_numbers(has)[:3]]
    lowered = opsets.lower_opset(model, max(runs, default=min(_FIRST_RUNTIME)))
    if lowered is None:
        _first_runtime(model, target)
    return lowered or model


def _first_runtime(model: onnx.ModelProto, target: Target) -> str:
    version = opsets.version(model)
    first = next((runtime for opset, runtime in _FIRST_RUNTIME.items() if version <= opset), None)
    has = target.runtimes.get("onnxruntime")
    if first is None or (has is not None and version_numbers(has)[:3] < version_numbers(first)[:3]):
        raise LoweringError(
            f"opset {version} needs ONNX Runtime {first or 'newer than is known here'}, "
            f"target {target.name} has {has or 'none stated'}",
            remedy=f"Export the model with opset {min(_FIRST_RUNTIME)} or lower",
        )
    return first
