"""Lowering for ONNX Runtime: int8 with ranges from calibration or of each call, weights stored small, float16, or the
graph itself."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedge_protocol.bundle.config import RuntimeRequirement, Verified
from kedge_protocol.errors import KedgeError, LoweringError, TargetError
from kedge_protocol.packages import pip_install
from kedge_targets import contract
from kedge_targets.backends.onnxruntime import gelu, int8, integer_products
from kedge_targets.contract import Calibration, Lowered
from kedge_targets.graph import (
    attention,
    batch,
    canonicalization,
    counting,
    deduplication,
    float_regions,
    gptq,
    layers,
    library,
    model_reader,
    model_writer,
    node_tracing,
    nodes,
    opsets,
    output_guard,
    plan_layers,
    qdq,
    quantizer_preparation,
    signature,
    weight_dequantization,
)
from kedge_targets.graph.calibration_reader import Samples
from kedge_targets.integer_saturation import FULL_RANGE, SEVEN_BITS, may_saturate
from kedge_targets.numerics import Family, Granularity, Numerics, Plan, Precision, QuantizationScheme, RangeMethod
from kedge_targets.target import Target
from kedge_targets.true_precision import Numbers

if TYPE_CHECKING:
    import onnx

ENTRY = "model.onnx"

# The right side of a product of two activations is packed anew in each call, and its kernel is not the fast one: in
# integers attention is no faster than in float, and worse.
_FULL_RANGE = replace(FULL_RANGE, products=False)
_SEVEN_BITS = replace(SEVEN_BITS, products=False)
_SIGNED = QuantizationScheme(
    activation="int8",
    weight="int8",
    symmetric_activation=False,
    granularity=Granularity.PER_CHANNEL,
    products=False,
)

# What is offered to a search beside what is usual.
_OTHERS = (
    FULL_RANGE,
    SEVEN_BITS,
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


class Compiler(contract.Compiler):
    """ONNX Runtime's quantizer and float16 converter.

    Options of a target's file:
        threads, spin: see :class:`kedge_targets.backends.onnxruntime.runtime.Runtime`.
    """

    reference = True

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

    def missing(self) -> str | None:
        """See :meth:`kedge_targets.contract.Compiler.missing`."""
        from importlib.util import find_spec

        absent = [name for name in ("onnx", "onnxruntime") if find_spec(name) is None]
        return f"{absent[0]} is missing: {pip_install('compile')}" if absent else None

    def verification(self, target: Target) -> Verified:
        """See :meth:`kedge_targets.contract.Compiler.verification`."""
        return Verified.EXECUTED

    def quantized_for(self, target: Target) -> tuple[QuantizationScheme, ...]:
        """See :meth:`kedge_targets.contract.Compiler.quantized_for`."""
        if may_saturate(target.processor):
            return (_SEVEN_BITS,)
        x86 = target.processor.architecture == "x86_64"
        return (_FULL_RANGE, _SEVEN_BITS if x86 else _SIGNED)

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

    def numbers(self, files: Mapping[str, Path], shapes: Mapping[str, Sequence[int]]) -> Numbers | None:
        """See :meth:`kedge_targets.contract.Compiler.numbers`. A convolution is computed in integers only where its
        answer is quantized too; a product with a matrix may answer in float."""
        return counting.numbers(
            model_reader.load(files[ENTRY]),
            shapes,
            integer_operators=("Conv", "Gemm", "MatMul"),
            rounded_answers=("Conv",),
        )


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
    given = model_reader.load(graph)
    nodes.check_operators(given, where=graph.name)
    precision = plan_layers.leading(plan)
    # Preparing such files would fold what they store small into weights of two or four times the bytes.
    already = precision in (Precision.INT8, Precision.FLOAT32) and qdq.has_qdq(given)
    small = (precision is Precision.FLOAT32 and canonicalization.stores_small(given)) or (
        precision is Precision.FLOAT16 and canonicalization.is_half(given)
    )
    prepared = (
        given
        if already or small
        else quantizer_preparation.prepare(given, workdir / "prepared.onnx", quantized=precision.quantized)
    )
    kept = quantizer_preparation.not_of(precision, plan, given, prepared)
    seconds: dict[str, float] = {}
    used = 0
    notes: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    runtime_options = {name: options[name] for name in ("threads", "spin") if name in options}
    if already:
        made, notes = prepared, (qdq.ALREADY,)
    elif precision is Precision.INT8:
        if not calibration.samples:
            raise LoweringError("there are no calibration samples", remedy="Give at least one; some hundred are usual")
        how = plan.scheme or compiler.quantized_for(target)[0]
        apart = () if how.products else _unnamed_products(given, plan)
        if apart:
            notes = (f"{len(apart)} products of two activations (attention) stay in float: integers are no faster",)
        must = {*kept, *node_tracing.trace_nodes(apart, given, prepared), *attention.before_softmax(prepared)}
        start = time.perf_counter()
        static = int8.static(prepared, plan, how, must, calibration)
        seconds["quantize"], used = time.perf_counter() - start, calibration.samples
        made = static.model
        if static.kept:
            notes += (output_guard.note(static.kept, static.weak),)
            apart += tuple(one.name for one in layers.layers(given) if one.name in static.kept)
        float_regions.pick_before_reading_back(made)
        integer_products.without_masks(made)
        integer_products.with_biases(made)
        gelu.by_tanh(made)
    elif precision is Precision.INT8_DYNAMIC:
        reduced = may_saturate(target.processor)
        made, seconds["quantize"] = int8.dynamic(prepared, kept, workdir, reduced_range=reduced)
    elif precision.family is Family.WEIGHTS:
        start = time.perf_counter()
        precisions = quantizer_preparation.assigned(plan, given, prepared)
        samples = Samples(calibration, batch.size(prepared))
        made = weight_dequantization.store_weights(
            prepared,
            precisions,
            group_size=plan.group_size,
            asymmetric=plan.asymmetric_weights,
            products=gptq.products(prepared, samples.batches(), precisions) if calibration.samples else {},
        )
        used = samples.used
        seconds["quantize"] = time.perf_counter() - start
    elif precision is Precision.FLOAT16 and not small:
        made = quantizer_preparation.convert_to_float16(prepared, kept)
    else:
        made = prepared
    # Of a transformer in float16 ONNX Runtime (1.23 to 1.31) needs the inferred shapes: without them its optimizer
    # crashes on an Add before a LayerNormalization.
    model_writer.strip(made, keep_shapes=precision is Precision.FLOAT16)
    if precision.quantized:
        deduplication.share_constants(made)
        deduplication.shorten_names(made)
    entry = workdir / ENTRY
    model_writer.save(made, entry)
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
        notes=notes,
        floating=apart,
    )


def _unnamed_products(model: onnx.ModelProto, plan: Plan) -> tuple[str, ...]:
    """Products of two activations that the plan does not name."""
    return tuple(one.name for one in layers.layers(model) if one.weight is None and one.name not in plan.layers)


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
