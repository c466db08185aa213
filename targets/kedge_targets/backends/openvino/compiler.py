"""Lowers models for OpenVINO: NNCF's post-training int8, or weights in float16 or float32."""

from __future__ import annotations

import contextlib
import io
import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kedge_protocol.bundle.config import RuntimeRequirement, TensorSpec, Verified
from kedge_protocol.errors import ConfigError, LoweringError, TargetError
from kedge_targets.backends.openvino import (
    counting,
    devices,
    library,
    nncf_patterns,
    nncf_preparation,
    opening,
    reading,
    representation,
    wrong_fusions,
)
from kedge_targets.backends.openvino.reaching import Reaching
from kedge_targets.backends.openvino.samples import Samples, SingleCalibration, at_once
from kedge_targets.compiler_template import CompilerTemplate, LoweringJob
from kedge_targets.contract import Array, Calibration, Lowered
from kedge_targets.graph import (
    attention,
    branches,
    free_dimensions,
    layers,
    model_reader,
    nodes,
    output_guard,
    plan_layers,
    qdq_insertion,
    signature,
)
from kedge_targets.integer_saturation import FULL_RANGE, SEVEN_BITS, may_saturate
from kedge_targets.numerics import Numerics, Precision, QuantizationScheme, Reach
from kedge_targets.target import Target
from kedge_targets.toolchain.driver_side.fewest import fewest
from kedge_targets.true_precision import Numbers

if TYPE_CHECKING:
    import onnx

    from kedge_targets.decoder.contract import DecoderCompiler

_FULL_RANGE = replace(FULL_RANGE, reach=Reach.GUARDED)
_SEVEN_BITS = replace(SEVEN_BITS, reach=Reach.GUARDED)
_SYMMETRIC = replace(_FULL_RANGE, activation="int8", symmetric_activation=True)

_KNOWN_OPTIONS = frozenset({*devices.KNOWN_OPTIONS, "model_type", "bias_correction"})
_MODEL_TYPES = ("any", "transformer")

_UNREAD_ROUNDED = frozenset({"GRU"})
"""Operators whose integer weights the CPU plugin (2026.4) refuses: "expects Constant for port 3"."""
_THEIR_TYPES = frozenset({"GRUSequence", "GRUCell"})
"""OpenVINO's own for them; they do not always keep the node's name."""

_NOT_COMPUTED = frozenset({"Constant", "Parameter"})

_RETURNS = 4
"""Trials of the guard to take nodes back into integers that are not needed in float; each quantizes anew."""

_FIRST_RUNTIME = "2025.0"
"""Oldest OpenVINO version known to read these files and to give the same results as 2026.4."""


class Compiler(CompilerTemplate):
    """Compiles with OpenVINO's ONNX reader and NNCF.

    Options of a target's file:
        device, threads, precision, streams, cache: see :class:`kedge_targets.backends.openvino.runtime.Runtime`.
        model_type: ``transformer`` makes NNCF keep in float what attention and residual sums need, ``any`` does not; by
            default determined from the graph.
        bias_correction: let NNCF correct each layer's bias by the mean quantization error (slow).
    """

    tools = "OpenVINO's tools"
    modules = ("onnx", "openvino", "nncf")
    known_options = _KNOWN_OPTIONS

    @property
    def numerics(self) -> Numerics:
        """See :meth:`kedge_targets.contract.Compiler.numerics`."""
        return Numerics(
            precisions=(Precision.INT8, Precision.FLOAT16, Precision.FLOAT32),
            schemes=(_FULL_RANGE, _SEVEN_BITS, _SYMMETRIC),
            mixed=True,
            layouts=("NCHW",),
        )

    def decoders(self) -> DecoderCompiler:
        """See :meth:`kedge_targets.contract.Compiler.decoders`."""
        from kedge_targets.backends.openvino.decoder.compiler import Compiler as Decoders

        return Decoders()

    def verification(self, target: Target) -> Verified:
        """See :meth:`kedge_targets.contract.Compiler.verification`. A file for a GPU or an NPU is run on the CPU here,
        which verifies its numbers but not the device's."""
        options = next((one.options for one in target.backends if one.name == "openvino"), {})
        return _verified(devices.settings(_of_runtime(options)))

    def quantized_for(self, target: Target) -> tuple[QuantizationScheme, ...]:
        """See :meth:`kedge_targets.contract.Compiler.quantized_for`."""
        return (_SEVEN_BITS,) if may_saturate(target.processor) else (_FULL_RANGE, _SYMMETRIC)

    def check(self, job: LoweringJob) -> None:
        """See :meth:`kedge_targets.compiler_template.CompilerTemplate.check`."""
        _settings(job)

    def reason_of(self, error: Exception) -> str:
        """See :meth:`kedge_targets.compiler_template.CompilerTemplate.reason_of`."""
        return library.reason_of(error)

    def lower_job(self, job: LoweringJob) -> Lowered:
        """See :meth:`kedge_targets.compiler_template.CompilerTemplate.lower_job`."""
        return _lower(job, job.plan.scheme or self.quantized_for(job.target)[0])

    def numbers(self, files: Mapping[str, Path], shapes: Mapping[str, Sequence[int]]) -> Numbers | None:
        """See :meth:`kedge_targets.contract.Compiler.numbers`."""
        return counting.numbers(files[representation.ENTRY], shapes)


def _lower(job: LoweringJob, how: QuantizationScheme) -> Lowered:
    plan, workdir, wanted = job.plan, job.workdir, _settings(job)
    openvino = library.load()
    read = model_reader.load(job.graph)
    if any(info.dtype == "float64" for info in signature.inputs(read)):
        job = replace(job, calibration=SingleCalibration(job.calibration))
    trained, fixed = read, tuple[str, ...]()
    if wanted.kind == devices.NPU:
        trained, fixed = free_dimensions.settle(read, job.calibration, device="an NPU")
        job = replace(job, calibration=free_dimensions.FilledCalibration(job.calibration, trained))
    precision = plan_layers.leading(plan)
    given, graph, model = opening.opened(openvino, read, trained, job, wanted)
    tools = {"openvino": openvino.__version__.split("-")[0]}
    quantized = _Quantized(model=model)
    if given.rounded:
        quantized = _Quantized(model=model, notes=(qdq_insertion.ALREADY,))
    elif precision is Precision.INT8:
        job.require_samples()
        quantized = _by_nncf(openvino, graph, given, how, job, wanted)
        tools["nncf"] = quantized.version
    elif others := plan_layers.others(plan, given.graph, precision):
        raise LoweringError(
            f"OpenVINO cannot keep single layers in another precision than {precision.value}",
            where=f"node {others[0]!r}",
            remedy="Give the whole graph one precision, or mix int8 with float32",
        )
    kept = {node.name for node in given.graph.graph.node}
    kept |= {name for node in given.graph.graph.node for name in node.output}
    files = representation.save(quantized.model, workdir, half=precision is Precision.FLOAT16, names=kept)
    return Lowered(
        files=files,
        entry=representation.ENTRY,
        inputs=_specs(signature.inputs(given.trained), signature.inputs(given.graph)),
        outputs=_specs(signature.outputs(given.trained), signature.outputs(given.graph)),
        runtimes=(RuntimeRequirement(distribution="openvino", minimum=_FIRST_RUNTIME),),
        verified=_verified(wanted),
        tools=tools,
        runtime_options=_of_runtime(job.options),
        seconds=quantized.seconds,
        notes=(*fixed, *given.notes, *quantized.notes, *_elsewhere(wanted)),
        calibration_samples=quantized.samples,
        floating=quantized.floating,
    )


@dataclass(frozen=True, kw_only=True)
class _Quantized:
    """OpenVINO's model and statistics of its quantization."""

    model: Any
    seconds: dict[str, float] = field(default_factory=dict)
    samples: int = 0
    version: str = ""
    notes: tuple[str, ...] = ()
    floating: tuple[str, ...] = ()


def _by_nncf(
    openvino: Any,
    graph: Path,
    given: opening.Ready,
    how: QuantizationScheme,
    job: LoweringJob,
    wanted: devices.Settings,
) -> _Quantized:
    usual = "transformer" if attention.products(given.graph) else "any"
    options = {"model_type": usual, **job.options}
    making = _Making(openvino, graph, given.graph, job.calibration, how, options, wanted.kind)
    if how.reaches_further(guard=job.plan.guard):
        making.reaching = Reaching(given.graph, job.calibration)
    deciding = branches.deciding(given.graph)
    must = [
        *deciding,
        *branches.deciding_within(given.graph),
        *plan_layers.others(job.plan, given.graph, Precision.INT8),
        *attention.before_softmax(given.graph),
        *(node.name for node in given.graph.graph.node if node.op_type in _UNREAD_ROUNDED),
        *nncf_preparation.of_norms(given.graph),
        *nncf_preparation.divisors(given.graph),
        *nncf_preparation.regrouping(given.graph),
        *wrong_fusions.barriers(given.graph),
    ]
    model, kept, weak = making.guarded(must) if job.plan.guard else (making.made(must), (), {})
    return _Quantized(
        model=model,
        seconds={"quantize": making.seconds},
        samples=making.used,
        version=making.version,
        notes=(*branches.note(deciding), *((output_guard.note(kept, weak),) if kept else ())),
        floating=tuple(one.name for one in layers.layers(given.read) if one.name in (*kept, *deciding)),
    )


def _elsewhere(wanted: devices.Settings) -> tuple[str, ...]:
    """Return a note for figures that were obtained on a device other than the target's."""
    said = f"accuracy and latency are of this host's CPU, not of the {wanted.device}"
    return () if wanted.on_cpu else (said,)


def _verified(wanted: devices.Settings) -> Verified:
    """Return how a file is verified: one for a GPU or an NPU is read and run by OpenVINO here, but on the CPU."""
    return Verified.EXECUTED if wanted.on_cpu else Verified.CHECKED


def _of_runtime(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in devices.KNOWN_OPTIONS}


def _specs(trained: list[signature.TensorInfo], given: list[signature.TensorInfo]) -> tuple[TensorSpec, ...]:
    """Return the trained model's tensors and the shapes and types in the file."""
    pairs = zip(signature.specs(trained), given, strict=True)
    return tuple(replace(spec, file=replace(spec.file, shape=info.shape, dtype=info.dtype)) for spec, info in pairs)


def _ignored(model: Any, given: onnx.ModelProto, names: Collection[str]) -> list[str]:
    """Return OpenVINO's operations that compute these nodes. It names one of a node's operations after the node, or
    ``NODE/part``, or after the node's output, and the others (the MVN of an InstanceNormalization, the Maximum of a
    Clip) as it likes: they lie between tensors that keep their names. What it cannot read in integers is always among
    the operations."""
    graphs = list(nodes.graphs(given.graph))
    wanted, every = set(names), [node for graph in graphs for node in graph.node]
    known = {value.name for graph in graphs for value in graph.input} | {name for node in every for name in node.output}
    answers = {name for node in every if node.name in wanted for name in node.output}
    found: dict[str, None] = {}
    for operation in _operations(model):
        name, kind = operation.get_friendly_name(), operation.get_type_name()
        if name in wanted or kind in _THEIR_TYPES or any(name.startswith(f"{node}/") for node in wanted):
            found[name] = None
        if _tensors(operation) & answers:
            found |= dict.fromkeys(_parts(operation, known))
    return list(found)


def _parts(last: Any, known: set[str]) -> Iterator[str]:
    """Yield the names of the operations from which this one computes a node's output, as far as tensors with names."""
    pending, seen = [last], set[str]()
    while pending:
        operation = pending.pop()
        name = operation.get_friendly_name()
        if name in seen or operation.get_type_name() in _NOT_COMPUTED:
            continue
        seen.add(name)
        yield name
        sources = [value.get_node() for value in operation.input_values()]
        pending += [source for source in sources if not _tensors(source) & known]


def _tensors(operation: Any) -> set[str]:
    return {name for port in operation.outputs() for name in port.get_names()}


def _operations(model: Any) -> Iterator[Any]:
    """Yield the operations of a model and, as NNCF rounds them too, of the branches of each If."""
    for operation in model.get_ordered_ops():
        yield operation
        if operation.get_type_name() == "If":
            for branch in (0, 1):
                yield from _operations(operation.get_function(branch))


class _Making:
    """Quantizes a graph with NNCF, and again with more nodes in float if an output is not accurate enough."""

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
        self.reaching: Reaching | None = None

    def guarded(self, must: list[str]) -> tuple[Any, tuple[str, ...], dict[str, float]]:
        """Return the model, the nodes that stay in float for the sake of an output, and the outputs that were weak
        without them."""
        feeds = output_guard.few(self._given, self._calibration)
        outputs = [info.name for info in signature.outputs(self._given)]
        reference = output_guard.answers(self._given, feeds, outputs)
        model = self.made(must)
        first = output_guard.weak(reference, self._answers(model, feeds, outputs))
        if not first:
            return model, (), first

        def tried(kept: Sequence[str]) -> tuple[Any, bool]:
            other = self.made([*must, *kept])
            return other, not output_guard.weak(reference, self._answers(other, feeds, outputs))

        simulated = output_guard.simulated(self._given, self._calibration)
        order = output_guard.noisiest(self._given, simulated, feeds, list(first))
        along = [node.name for node in self._given.graph.node]
        model, kept = fewest(order, tried, along=along, returns=_RETURNS)
        return model, kept, first

    def made(self, floating: list[str]) -> Any:
        """Return the model with these nodes in float."""
        model = reading.read(self._openvino, self._graph, self._given)
        samples = Samples(self._calibration, at_once(self._given, self._options))
        ignored = _ignored(model, self._given, floating)
        made, seconds, self.version = _quantized(model, self._how, ignored, samples, self._options, self._kind)
        self.seconds += seconds
        self.used = samples.used
        if self.reaching is not None:
            self.reaching.extend(made)
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
    model: Any, how: QuantizationScheme, ignored: list[str], samples: Samples, options: Mapping[str, Any], kind: str
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
        nncf_patterns.keep()
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


def _settings(job: LoweringJob) -> devices.Settings:
    where, options = f"target {job.target.name}, options", job.options
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
