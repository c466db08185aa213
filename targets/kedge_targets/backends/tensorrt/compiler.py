"""Lowers models for TensorRT: the graphs from which a device builds its engines, checked by NVIDIA's parser and
builder.

An engine is valid for one version of TensorRT on one type of GPU, so none is made here: the bundle carries an int8
graph (explicit QDQ) and an fp16 graph, both with float32 inputs and outputs, and a recipe. The device builds both and
keeps the faster.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedge_protocol.bundle.config import RuntimeRequirement, TensorSpec, Verified
from kedge_protocol.errors import LoweringError, TargetError
from kedge_targets.backends.tensorrt import operators, parser_check, profiles, quantization, recipe
from kedge_targets.compiler_template import CompilerTemplate, LoweringJob
from kedge_targets.contract import Calibration, Lowered
from kedge_targets.graph import (
    batch,
    counting,
    dequantization,
    integer_operators,
    library,
    model_reader,
    model_writer,
    nodes,
    opsets,
    plan_layers,
    quantizer_preparation,
    signature,
)
from kedge_targets.numerics import Numerics, Plan, Precision, QuantizationScheme
from kedge_targets.target import Target
from kedge_targets.true_precision import Numbers

if TYPE_CHECKING:
    import onnx

    from kedge_targets.decoder.contract import DecoderCompiler

RUNTIME = "tensorrt"
_FALLBACK_MINIMUM = "1.20"
_FALLBACK_OPSET = 21  # of that version
_BELOW = recipe.LINES[-1].below

_RUNTIME_OPTIONS = ("threads", "build_seconds", "build_mib")
_KNOWN_OPTIONS = frozenset({*_RUNTIME_OPTIONS, "batch", "max_batch", "workspace_mib"})
_WORKSPACE_SHARE = 8  # of a device's memory one part of so many
_LARGEST_WORKSPACE = 1 << 30


class Compiler(CompilerTemplate):
    """Compiles with ONNX Runtime's quantizer and float16 converter, then checks with NVIDIA's parser and builder.

    Options of a target's file:
        threads, build_seconds, build_mib: see :class:`kedge_targets.backends.tensorrt.runtime.Runtime`.
        batch: number of samples at once, fixed in the files; 1 by default.
        max_batch: leave the batch dynamic instead, for engines that take 1 to this many samples at once.
        workspace_mib: scratch memory that the builder and the engine may use; by default an eighth of the device's
            memory, at most 1024.
    """

    tools = "ONNX Runtime's tools"
    toolchain = parser_check.NAME
    known_options = _KNOWN_OPTIONS

    @property
    def numerics(self) -> Numerics:
        """See :meth:`kedge_targets.contract.Compiler.numerics`."""
        return Numerics(
            precisions=(Precision.INT8, Precision.FLOAT16),
            schemes=(quantization.SYMMETRIC,),
            mixed=True,
            layouts=("NCHW",),
        )

    def require_tools(self) -> None:
        """See :meth:`kedge_targets.compiler_template.CompilerTemplate.require_tools`."""
        library.load()
        super().require_tools()

    def decoders(self) -> DecoderCompiler:
        """See :meth:`kedge_targets.contract.Compiler.decoders`."""
        from kedge_targets.backends.tensorrt.decoder.compiler import Compiler as Decoders

        return Decoders()

    def verification(self, target: Target) -> Verified:
        """See :meth:`kedge_targets.contract.Compiler.verification`."""
        return Verified.CHECKED

    def quantized_for(self, target: Target) -> tuple[QuantizationScheme, ...]:
        """See :meth:`kedge_targets.contract.Compiler.quantized_for`."""
        return (quantization.SYMMETRIC,)

    def check(self, job: LoweringJob) -> None:
        """See :meth:`kedge_targets.compiler_template.CompilerTemplate.check`."""
        _check(job.plan, job.options, job.target)
        if plan_layers.leading(job.plan) is Precision.INT8:
            job.require_samples()

    def lower_job(self, job: LoweringJob) -> Lowered:
        """See :meth:`kedge_targets.compiler_template.CompilerTemplate.lower_job`."""
        return _lower(job)

    def numbers(self, files: Mapping[str, Path], shapes: Mapping[str, Sequence[int]]) -> Numbers | None:
        """See :meth:`kedge_targets.contract.Compiler.numbers`: numbers of the int8 graph if there is one, as TensorRT
        fuses it."""
        graph = files.get(recipe.FILES[recipe.INT8]) or files[recipe.FILES[recipe.FP16]]
        kinds = ("Conv", "ConvTranspose", "Gemm", "MatMul")
        return counting.numbers(model_reader.load(graph), shapes, integer_operators=kinds)


@dataclass(frozen=True, kw_only=True)
class _Graph:
    """The user's graph with its batch fixed, and the same graph prepared.

    Attributes:
        shapes: the model's own input and output shapes, by name.
        fit: what the tables say about it.
        notes: what was done to it, for the user.
        ranges: activation ranges from a file that was already quantized.
    """

    given: onnx.ModelProto
    prepared: onnx.ModelProto
    shapes: dict[str, tuple[int | None, ...]]
    fit: operators.Fit
    notes: tuple[str, ...]
    ranges: dict[str, tuple[float, float]]


def _lower(job: LoweringJob) -> Lowered:
    import onnx

    runtime = library.load()
    plan, calibration, target = job.plan, job.calibration, job.target
    options, workdir = job.options, job.workdir
    leading = plan_layers.leading(plan)
    ready = _ready(job.graph, target, options, workdir, calibration)
    files: dict[str, Path] = {}
    notes = [*ready.notes, *ready.fit.notes]
    seconds: dict[str, float] = {}
    used = 0
    watched = profiles.Watched(calibration)
    # The converter to float16 works in place, the quantizer on a file: the graph is copied for the first.
    if leading is Precision.INT8:
        excluded = quantizer_preparation.not_of(Precision.INT8, plan, ready.given, ready.prepared)
        half = _halved(ready, _kept_float(plan, ready))
        made, seconds["quantize"] = quantization.quantize_graph(ready.prepared, excluded, watched, ready.ranges)
        notes += quantization.notes(made)
        model_writer.strip(made)
        files[recipe.INT8] = _saved(made, recipe.INT8, workdir)
        used = calibration.samples
    else:
        half = _halved(ready, quantizer_preparation.not_of(Precision.FLOAT16, plan, ready.given, ready.prepared))
    # ONNX Runtime, which serves where TensorRT cannot, needs the inferred shapes of a float16 transformer.
    model_writer.strip(half, keep_shapes=True)
    files[recipe.FP16] = _saved(half, recipe.FP16, workdir)
    written = _recipe(half, files, watched, target, options)
    seconds["check"] = _checked(written, files, notes)
    recipe.write(written, workdir / recipe.ENTRY)
    return Lowered(
        files={path.name: path for path in files.values()} | {recipe.ENTRY: workdir / recipe.ENTRY},
        entry=recipe.ENTRY,
        inputs=_specs(signature.inputs(half), ready),
        outputs=_specs(signature.outputs(half), ready),
        runtimes=_runtimes(ready),
        verified=Verified.CHECKED,
        tools={"onnx": onnx.__version__, runtime.__name__: runtime.__version__, **parser_check.versions()},
        runtime_options={name: options[name] for name in _RUNTIME_OPTIONS if name in options},
        seconds=seconds,
        notes=tuple(notes),
        calibration_samples=used,
    )


def _ready(graph: Path, target: Target, options: Mapping[str, Any], workdir: Path, calibration: Calibration) -> _Graph:
    loaded = model_reader.load(graph)
    nodes.check_operators(loaded, where=graph.name)
    ends = (*signature.inputs(loaded), *signature.outputs(loaded))
    fixed = integer_operators.in_pairs(_batched(loaded, options, where=graph.name))
    given, taken = dequantization.restored(fixed, calibration)
    version = target.runtimes[RUNTIME]
    operators.fit(given, version, where=graph.name)
    prepared = quantizer_preparation.prepare(given, workdir / "prepared.onnx", quantized=True)
    # Once more: the optimizer may have taken operators away, and an old opset has been raised.
    fit = operators.fit(prepared, version, where=graph.name)
    shapes = {info.name: info.shape for info in ends}
    return _Graph(
        given=given, prepared=prepared, shapes=shapes, fit=fit, notes=taken, ranges=dequantization.own_ranges(fixed)
    )


def _batched(loaded: onnx.ModelProto, options: Mapping[str, Any], *, where: str) -> onnx.ModelProto:
    """Return the graph with its batch fixed, unless it should be dynamic."""
    have = batch.size(loaded)
    if have is not None and options.get("batch", have) != have:
        raise LoweringError(
            f"its batch is fixed to {have}, the target asks for {options['batch']}",
            where=where,
            remedy="Export the model with a free batch axis",
        )
    if "max_batch" in options:
        return loaded
    return batch.fix_batch(loaded, have or options.get("batch", 1))


def _kept_float(plan: Plan, ready: _Graph) -> list[str]:
    """Return the layers that the plan keeps in float32 by name; they stay so in the fp16 graph too."""
    if plan.default is not Precision.INT8:
        return []
    kept = Plan(default=Precision.FLOAT16, layers=plan.layers)
    return quantizer_preparation.not_of(Precision.FLOAT16, kept, ready.given, ready.prepared)


def _halved(ready: _Graph, excluded: list[str]) -> onnx.ModelProto:
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(ready.prepared)
    return quantizer_preparation.convert_to_float16(copy, excluded)


def _saved(model: onnx.ModelProto, precision: str, workdir: Path) -> Path:
    path = workdir / recipe.FILES[precision]
    model_writer.save(model, path)
    return path


def _recipe(
    model: onnx.ModelProto,
    files: Mapping[str, Path],
    watched: profiles.Watched,
    target: Target,
    options: Mapping[str, Any],
) -> recipe.Recipe:
    workspace = min(target.system.memory_bytes // _WORKSPACE_SHARE, _LARGEST_WORKSPACE)
    return recipe.Recipe(
        precisions=tuple(files),
        files={precision: path.name for precision, path in files.items()},
        workspace_bytes=options["workspace_mib"] << 20 if "workspace_mib" in options else workspace,
        inputs=profiles.of(signature.inputs(model), watched, options.get("max_batch", 1)),
        outputs=tuple(info.name for info in signature.outputs(model)),
    )


def _checked(written: recipe.Recipe, files: Mapping[str, Path], notes: list[str]) -> float:
    """Let NVIDIA's tools try each graph, since none ships that they refuse. Return the seconds that this took."""
    began = time.perf_counter()
    for path in files.values():
        found = parser_check.check(
            path,
            workspace_bytes=written.workspace_bytes,
            profiles=tuple(item for item in written.inputs if not item.static),
        )
        parser_check.require(found, where=path.name)
        notes += [f"{path.name}: {warning}" for warning in found.warnings[:3]]
    notes.append(
        f"NVIDIA's parser and builder take the graphs for {', '.join(parser_check.CAPABILITIES)}; "
        "no GPU has run them here"
    )
    return time.perf_counter() - began


def _specs(infos: list[signature.TensorInfo], ready: _Graph) -> tuple[TensorSpec, ...]:
    """Return the model's tensors, with a dynamic batch in their shapes; the file's batch is fixed."""
    layouts = {info.name: info.layout for info in signature.inputs(ready.given)}
    return tuple(replace(spec, shape=ready.shapes[spec.name]) for spec in signature.specs(infos, layouts=layouts))


def _runtimes(ready: _Graph) -> tuple[RuntimeRequirement, ...]:
    first = max(ready.fit.first, recipe.LINES[0].first, key=recipe.numbers)
    found = [RuntimeRequirement(distribution=RUNTIME, minimum=first, below=_BELOW)]
    if opsets.version(ready.prepared) <= _FALLBACK_OPSET:
        plain = library.load().__name__  # the distribution has the package's name
        found += [RuntimeRequirement(distribution=name, minimum=_FALLBACK_MINIMUM) for name in (f"{plain}-gpu", plain)]
    return tuple(found)


def _check(plan: Plan, options: Mapping[str, Any], target: Target) -> None:
    where = f"target {target.name}"
    if RUNTIME not in target.runtimes:
        raise TargetError(
            "does not say which TensorRT its devices have",
            where=where,
            remedy='Write it below [runtimes], as in tensorrt = "10.3"',
        )
    for name, value in options.items():
        least = 1 if name in ("batch", "max_batch", "workspace_mib") else 0
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise TargetError(f"option {name} = {value!r} is no number of {least} or more", where=where)
    if "batch" in options and "max_batch" in options:
        raise TargetError("both batch and max_batch are given", where=where, remedy="Give the one or the other")
    wanted = {plan.default, *plan.layers.values()}
    if wanted == {Precision.FLOAT32}:
        raise LoweringError("TensorRT is asked for int8 or float16; in float32 ONNX Runtime is as good", where=where)
    if Precision.INT8 in wanted and plan.scheme not in (None, quantization.SYMMETRIC):
        raise LoweringError(f"TensorRT cannot quantize so: {plan.scheme}", where=where)
