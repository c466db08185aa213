"""Lowering for OpenVINO: NNCF's post-training int8, or weights in float16 or float32."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kedge_protocol.bundle.config import RuntimeRequirement, TensorSpec, Verified
from kedge_protocol.errors import ConfigError, KedgeError, LoweringError, TargetError, UnsupportedOperatorError
from kedge_protocol.packages import pip_install
from kedge_targets import contract
from kedge_targets.backends.openvino import counting, devices, library, nncf_preparation, representation
from kedge_targets.backends.openvino.runtime import reason_of
from kedge_targets.contract import Array, Calibration, Lowered
from kedge_targets.graph import (
    attention,
    batch,
    free_dimensions,
    layers,
    model_reader,
    model_writer,
    nodes,
    output_guard,
    plan_layers,
    qdq,
    signature,
)
from kedge_targets.integer_saturation import FULL_RANGE, SEVEN_BITS, may_saturate
from kedge_targets.numerics import Granularity, Numerics, Plan, Precision, QuantizationScheme
from kedge_targets.target import Target
from kedge_targets.true_precision import Numbers

if TYPE_CHECKING:
    import onnx

_SYMMETRIC = QuantizationScheme(
    activation="int8", weight="int8", symmetric_activation=True, granularity=Granularity.PER_CHANNEL
)

_KNOWN_OPTIONS = frozenset({*devices.KNOWN_OPTIONS, "model_type", "bias_correction"})
_MODEL_TYPES = ("any", "transformer")

_UNREAD_ROUNDED = frozenset({"GRU"})
"""The CPU plugin (2026.4) refuses their weights in integers: "expects Constant for port 3"."""

_UNREAD = re.compile(r"(?:No conversion rule found for operations|Conversion is failed for): *([^\n]+)")

_FIRST_RUNTIME = "2025.0"
"""The oldest OpenVINO that was seen to read these files and to answer as 2026.4 does."""


class Compiler(contract.Compiler):
    """OpenVINO's ONNX reader and NNCF.

    Options of a target's file:
        device, threads, precision, streams, cache: see :class:`kedge_targets.backends.openvino.runtime.Runtime`.
        model_type: ``transformer`` makes NNCF keep what attention and residual sums need in float, ``any`` does not;
            by default what the graph has.
        bias_correction: let NNCF correct each layer's bias by the mean error that quantization made (slow).
    """

    @property
    def numerics(self) -> Numerics:
        """See :meth:`kedge_targets.contract.Compiler.numerics`."""
        return Numerics(
            precisions=(Precision.INT8, Precision.FLOAT16, Precision.FLOAT32),
            schemes=(FULL_RANGE, SEVEN_BITS, _SYMMETRIC),
            mixed=True,
            layouts=("NCHW",),
        )

    def missing(self) -> str | None:
        """See :meth:`kedge_targets.contract.Compiler.missing`."""
        from importlib.util import find_spec

        absent = [name for name in ("onnx", "openvino", "nncf") if find_spec(name) is None]
        return f"{absent[0]} is missing: {pip_install('compile')}" if absent else None

    def verification(self, target: Target) -> Verified:
        """See :meth:`kedge_targets.contract.Compiler.verification`. A file for a GPU or an NPU is run on the CPU here,
        which proves its numbers and not the device's."""
        options = next((one.options for one in target.backends if one.name == "openvino"), {})
        return _verified(devices.settings(_of_runtime(options)))

    def quantized_for(self, target: Target) -> tuple[QuantizationScheme, ...]:
        """See :meth:`kedge_targets.contract.Compiler.quantized_for`."""
        return (SEVEN_BITS,) if may_saturate(target.processor) else (FULL_RANGE, _SYMMETRIC)

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
        wanted = _check_options(options, target)
        how = plan.scheme or self.quantized_for(target)[0]
        try:
            return _lower(graph, plan, how, calibration, options=options, wanted=wanted, workdir=workdir)
        except KedgeError:
            raise
        except Exception as error:  # what the vendor's packages raise has no common base
            raise LoweringError(
                f"OpenVINO's tools failed: {type(error).__name__}: {reason_of(error)}", where=graph.name
            ) from error

    def numbers(self, files: Mapping[str, Path], shapes: Mapping[str, Sequence[int]]) -> Numbers | None:
        """See :meth:`kedge_targets.contract.Compiler.numbers`."""
        return counting.numbers(files[representation.ENTRY], shapes)


def _lower(
    graph: Path,
    plan: Plan,
    how: QuantizationScheme,
    calibration: Calibration,
    *,
    options: Mapping[str, Any],
    wanted: devices.Settings,
    workdir: Path,
) -> Lowered:
    openvino = library.load()
    trained = read = model_reader.load(graph)
    fixed: tuple[str, ...] = ()
    if wanted.kind == devices.NPU:
        trained, fixed = free_dimensions.settle(read, calibration, device="an NPU")
    given = trained
    if not wanted.on_cpu and batch.size(given) is None:
        # An NPU takes fixed shapes only, and a GPU compiles each size anew.
        given = batch.fix_batch(given, 1)
    precision = plan_layers.leading(plan)
    already = precision is Precision.INT8 and qdq.has_qdq(given)
    if precision is Precision.INT8 and not already:
        given = model_reader.infer_shapes(nncf_preparation.prepare_for_nncf(given), where=graph.name)
    if given is not read:
        graph = workdir / "prepared.onnx"
        model_writer.save(given, graph)
    model = _read(openvino, graph, given)
    tools = {"openvino": openvino.__version__.split("-")[0]}
    seconds: dict[str, float] = {}
    used = 0
    apart: tuple[str, ...] = ()
    said: tuple[str, ...] = ()
    if already:
        said = (qdq.ALREADY,)
    elif precision is Precision.INT8:
        if not calibration.samples:
            raise LoweringError("there are no calibration samples", remedy="Give at least one; some hundred are usual")
        usual = "transformer" if attention.products(given) else "any"
        making = _Making(openvino, graph, given, calibration, how, {"model_type": usual, **options}, wanted.kind)
        unread = [node.name for node in given.graph.node if node.op_type in _UNREAD_ROUNDED]
        must = [
            *plan_layers.others(plan, given, precision),
            *attention.before_softmax(given),
            *unread,
            *nncf_preparation.centring(given),
        ]
        model, kept_in_float, weak = making.guarded(must) if plan.guard else (making.made(must), (), {})
        seconds["quantize"], tools["nncf"], used = making.seconds, making.version, making.used
        if kept_in_float:
            apart = tuple(one.name for one in layers.layers(read) if one.name in kept_in_float)
            said = (output_guard.note(kept_in_float, weak),)
    elif others := plan_layers.others(plan, given, precision):
        raise LoweringError(
            f"OpenVINO cannot keep single layers in another precision than {precision.value}",
            where=f"node {others[0]!r}",
            remedy="Give the whole graph one precision, or mix int8 with float32",
        )
    kept = {node.name for node in given.graph.node} | {name for node in given.graph.node for name in node.output}
    files = representation.save(model, workdir, half=precision is Precision.FLOAT16, names=kept)
    return Lowered(
        files=files,
        entry=representation.ENTRY,
        inputs=_specs(signature.inputs(trained), signature.inputs(given)),
        outputs=_specs(signature.outputs(trained), signature.outputs(given)),
        runtimes=(RuntimeRequirement(distribution="openvino", minimum=_FIRST_RUNTIME),),
        verified=_verified(wanted),
        tools=tools,
        runtime_options=_of_runtime(options),
        seconds=seconds,
        notes=(*fixed, *said, *_elsewhere(wanted)),
        calibration_samples=used,
        floating=apart,
    )


def _elsewhere(wanted: devices.Settings) -> tuple[str, ...]:
    """What a reader must know of figures that another device than the target's gave."""
    said = f"accuracy and latency are of this host's CPU, not of the {wanted.device}"
    return () if wanted.on_cpu else (said,)


def _verified(wanted: devices.Settings) -> Verified:
    """A file for a GPU or an NPU is read and run by OpenVINO here, but on the CPU."""
    return Verified.EXECUTED if wanted.on_cpu else Verified.CHECKED


def _of_runtime(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in devices.KNOWN_OPTIONS}


def _specs(trained: list[signature.TensorInfo], given: list[signature.TensorInfo]) -> tuple[TensorSpec, ...]:
    """The trained model's tensors, and the shapes that the file has."""
    pairs = zip(signature.specs(trained), given, strict=True)
    return tuple(replace(spec, file=replace(spec.file, shape=info.shape)) for spec, info in pairs)


def _read(openvino: Any, graph: Path, given: onnx.ModelProto) -> Any:
    try:
        model = openvino.Core().read_model(str(graph))
    except Exception as error:  # the library raises RuntimeError and its own, without a common base
        # It names operators ("Det-17, com.example.Other-1"), not nodes.
        told = " ".join(_UNREAD.findall(str(error)))
        for node in nodes.nodes(given):
            if re.search(rf"(?<!\w){re.escape(node.operator)}(?!\w)", told):
                raise UnsupportedOperatorError(
                    f"OpenVINO does not read operator {node.operator!r} of {node.domain}",
                    where=f"node {node.name!r}",
                    remedy="Export the model with another operator in its place",
                ) from error
        raise LoweringError(f"OpenVINO cannot read the graph: {reason_of(error)}", where=graph.name) from error
    _check_order(model, given)
    # NNCF takes a weight only where it is a constant, not where it is computed from one.
    from openvino.passes import ConstantFolding, Manager

    manager = Manager()
    manager.register_pass(ConstantFolding())
    manager.run_passes(model)
    return model


def _check_order(model: Any, given: onnx.ModelProto) -> None:
    """A session takes arrays by position, so the representation must have kept inputs and outputs in their order."""
    for kind, mine, theirs in (
        ("inputs", signature.inputs(given), model.inputs),
        ("outputs", signature.outputs(given), model.outputs),
    ):
        if len(mine) != len(theirs) or any(
            info.name not in port.get_names() for info, port in zip(mine, theirs, strict=True)
        ):
            raise LoweringError(
                f"OpenVINO changed the order of the {kind}",
                where=", ".join(info.name for info in mine),
                remedy="Report this model to Kedge's maintainers",
            )


def _ignored(model: Any, names: list[str]) -> list[str]:
    """OpenVINO's nodes that stem from these nodes: it splits one node into several named ``NODE/part``."""
    wanted = set(names)
    return [
        name
        for name in (operation.get_friendly_name() for operation in model.get_ordered_ops())
        if name in wanted or any(name.startswith(f"{node}/") for node in wanted)
    ]


class _Making:
    """A graph quantized by NNCF, anew where an output does not hold."""

    def __init__(
        self,
        openvino: Any,
        graph: Path,
        given: onnx.ModelProto,
        calibration: Calibration,
        how: QuantizationScheme,
        options: Mapping[str, Any],
        kind: str,
    ) -> None:
        self._openvino, self._graph, self._given, self._calibration = openvino, graph, given, calibration
        self._how, self._options, self._kind = how, options, kind
        self.seconds, self.version, self.used = 0.0, "", 0

    def guarded(self, must: list[str]) -> tuple[Any, tuple[str, ...], dict[str, float]]:
        """The model, the nodes that stay in float for an output's sake, and the outputs that were weak without."""
        feeds = output_guard.few(self._given, self._calibration)
        outputs = [info.name for info in signature.outputs(self._given)]
        reference = output_guard.answers(self._given, feeds, outputs)
        model = self.made(must)
        found = first = output_guard.weak(reference, self._answers(model, feeds, outputs))
        kept: tuple[str, ...] = ()
        order: list[str] = []
        if found:
            simulated = output_guard.simulated(self._given, self._calibration)
            order = output_guard.noisiest(self._given, simulated, feeds, list(found))
        while found and len(kept) < len(order):
            kept = tuple(order[: max(1, 2 * len(kept))])
            model = self.made([*must, *kept])
            found = output_guard.weak(reference, self._answers(model, feeds, outputs))
        return model, kept, first

    def made(self, floating: list[str]) -> Any:
        """The model with these nodes in float."""
        model = _read(self._openvino, self._graph, self._given)
        samples = _Samples(self._calibration, batch.size(self._given))
        ignored = _ignored(model, floating)
        made, seconds, self.version = _quantized(model, self._how, ignored, samples, self._options, self._kind)
        self.seconds += seconds
        self.used = samples.used
        return made

    def _answers(self, model: Any, feeds: Sequence[Mapping[str, Array]], outputs: list[str]) -> list[dict[str, Array]]:
        compiled = self._openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        names = [info.name for info in signature.inputs(self._given)]
        made = []
        for feed in feeds:
            answers = compiled([feed[name] for name in names])
            made.append(dict(zip(outputs, (np.array(answers[index]) for index in range(len(outputs))), strict=True)))
        return made


def _quantized(
    model: Any, how: QuantizationScheme, ignored: list[str], samples: _Samples, options: Mapping[str, Any], kind: str
) -> tuple[Any, float, str]:
    # Not NNCF's own choices but what measured best (weights of 7 bits; drop in top-1, agreement with float):
    #   NNCF's ranges and fast bias correction   ic_resnet8 0.007, 0.940; kws_dscnn 0.004, 0.981 (symmetric)
    #   plain extremes, fast bias correction     ic_resnet8 -0.013, 0.947; kws_dscnn 0.001, 0.989
    #   plain extremes, no bias correction       ic_resnet8 -0.027, 0.973; kws_dscnn 0.000, 0.988
    #   plain extremes, full bias correction     ic_resnet8 -0.007, 0.980; kws_dscnn -0.003, 0.995, two to four times
    #                                            as long, more on deep networks
    # NNCF imports PyTorch wherever it is installed, a second and 200 MB that an OpenVINO graph has no use for.
    # What it prints (progress, notes) belongs to no one.
    with library.hidden("torch", library.TELEMETRY), contextlib.redirect_stdout(io.StringIO()):
        import nncf
        from nncf.quantization.advanced_parameters import (
            AdvancedQuantizationParameters,
            AdvancedSmoothQuantParameters,
            OverflowFix,
        )
        from nncf.quantization.range_estimator import RangeEstimatorParametersSet

        logging.getLogger("nncf").setLevel(logging.ERROR)
        start = time.perf_counter()
        made = nncf.quantize(
            model,
            nncf.Dataset(samples),
            preset=nncf.QuantizationPreset.PERFORMANCE if how.symmetric_activation else nncf.QuantizationPreset.MIXED,
            target_device=nncf.TargetDevice[kind],
            subset_size=samples.batches,
            model_type=nncf.ModelType.TRANSFORMER if options.get("model_type") == "transformer" else None,
            ignored_scope=nncf.IgnoredScope(names=ignored) if ignored else None,
            # The one that runs through branches; whether biases are corrected is said below.
            fast_bias_correction=any(one.get_type_name() == "If" for one in model.get_ops()),
            advanced_parameters=AdvancedQuantizationParameters(
                overflow_fix=OverflowFix.ENABLE if how.reduced_range else OverflowFix.DISABLE,
                activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
                disable_bias_correction=not options.get("bias_correction", False),
                # Of transformers NNCF would even out activations by itself; that is a step of the host's, to be seen.
                smooth_quant_alphas=AdvancedSmoothQuantParameters(matmul=-1, convolution=-1),
            ),
        )
        seconds = time.perf_counter() - start
    return made, seconds, str(nncf.__version__)


class _Samples:
    """The calibration as NNCF reads it, as often as it wants to: one batch after the other, none kept."""

    def __init__(self, calibration: Calibration, at_once: int | None) -> None:
        self.used = 0
        self._calibration = calibration
        self._at_once = at_once
        self.batches = -(-calibration.samples // (at_once or 1))

    def __iter__(self) -> Iterator[dict[str, Array]]:
        return batch.regroup(self._counted(), self._at_once)

    def _counted(self) -> Iterator[dict[str, Array]]:
        for count, sample in enumerate(self._calibration, start=1):
            self.used = max(self.used, count)
            yield sample


def _check_options(options: Mapping[str, Any], target: Target) -> devices.Settings:
    where = f"target {target.name}, options"
    if unknown := sorted(set(options) - _KNOWN_OPTIONS):
        raise TargetError(f"unknown option {unknown[0]!r}", where=where, remedy=f"Known are {sorted(_KNOWN_OPTIONS)}")
    if options.get("model_type", "any") not in _MODEL_TYPES:
        raise TargetError(
            f"model_type = {options['model_type']!r} is unknown", where=where, remedy=f"Known are {_MODEL_TYPES}"
        )
    if not isinstance(options.get("bias_correction", False), bool):
        raise TargetError(f"bias_correction = {options['bias_correction']!r} is neither true nor false", where=where)
    try:
        return devices.settings(_of_runtime(options))
    except ConfigError as error:
        raise TargetError(error.what, where=where, remedy=error.remedy) from error
