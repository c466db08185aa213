"""Lowers models for LiteRT: ONNX to TensorFlow with onnx2tf, to .tflite with TensorFlow, both in a separate
toolchain."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.bundle.config import FileTensor, RuntimeRequirement, TensorSpec, Verified
from kedge_protocol.errors import (
    LoweringError,
    StorageError,
)
from kedge_targets.backends.tflite import counting, float_model, toolchain_client
from kedge_targets.backends.tflite.float_model import FloatFile
from kedge_targets.backends.tflite.runtime import Runtime
from kedge_targets.backends.tflite.toolchain_client import Converted, ConvertedTensor, ConvertRequest
from kedge_targets.compiler_template import CompilerTemplate, LoweringJob
from kedge_targets.contract import Calibration, Lowered
from kedge_targets.graph import (
    batch,
    branches,
    canonicalization,
    concat_scales,
    dequantization,
    free_dimensions,
    library,
    model_reader,
    plan_layers,
    signature,
)
from kedge_targets.numerics import Granularity, Numerics, Plan, Precision, QuantizationScheme, Reach
from kedge_targets.target import Target
from kedge_targets.true_precision import Numbers

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]

ENTRY = "model.tflite"

_QUANTIZED = QuantizationScheme(
    activation="int8",
    weight="int8",
    symmetric_activation=False,
    granularity=Granularity.PER_CHANNEL,
    reach=Reach.GUARDED,
)
_RUNTIMES = (("ai-edge-litert", "2.1"), ("tflite-runtime", "2.14.0"))
_KNOWN_OPTIONS = frozenset({"threads"})
_NAMED = 6
_COARSE = 20.0  # dB of an output, below which the report says so


class Compiler(CompilerTemplate):
    """Compiles with TensorFlow's converter, fed by onnx2tf.

    Options of a target's file:
        threads: see :class:`kedge_targets.backends.tflite.runtime.Runtime`.
    """

    tools = "TensorFlow's tools"
    toolchain = toolchain_client.NAME
    no_decoders = "TensorFlow Lite keeps no cache of keys and values, so that each token would read the whole text anew"
    known_options = _KNOWN_OPTIONS

    @property
    def numerics(self) -> Numerics:
        """See :meth:`kedge_targets.contract.Compiler.numerics`."""
        return Numerics(
            precisions=(Precision.INT8, Precision.INT8_DYNAMIC, Precision.FLOAT16, Precision.FLOAT32),
            schemes=(_QUANTIZED,),
            mixed=True,
            layouts=("NHWC",),
            layers=(Precision.INT16,),
        )

    def require_tools(self) -> None:
        """See :meth:`kedge_targets.compiler_template.CompilerTemplate.require_tools`."""
        library.load()
        Runtime().check()
        super().require_tools()

    def verification(self, target: Target) -> Verified:
        """See :meth:`kedge_targets.contract.Compiler.verification`."""
        return Verified.EXECUTED

    def quantized_for(self, target: Target) -> tuple[QuantizationScheme, ...]:
        """See :meth:`kedge_targets.contract.Compiler.quantized_for`."""
        return (_QUANTIZED,)

    def check(self, job: LoweringJob) -> None:
        """See :meth:`kedge_targets.compiler_template.CompilerTemplate.check`."""
        _check(job.plan, plan_layers.leading(job.plan), job.target)
        if plan_layers.leading(job.plan) is Precision.INT8:
            job.require_samples()

    def lower_job(self, job: LoweringJob) -> Lowered:
        """See :meth:`kedge_targets.compiler_template.CompilerTemplate.lower_job`."""
        plan, calibration, workdir, options = job.plan, job.calibration, job.workdir, job.options
        precision = plan_layers.leading(plan)
        toolchain_client.start()
        begun = time.perf_counter()
        given = model_reader.load(job.graph)
        model, fixed = free_dimensions.settle(given, calibration, device="TFLite")
        calibration = free_dimensions.FilledCalibration(calibration, model)
        model, taken = dequantization.restored(model, calibration)
        model = canonicalization.in_float32(model)
        if precision is Precision.INT8:
            model = concat_scales.even_out(model, calibration)
        layers = plan_layers.others(plan, given, precision) if plan.layers else []
        deciding = branches.deciding(model) if precision is Precision.INT8 else []
        notes = (*fixed, *taken, *branches.note(deciding))
        float_file = float_model.make_float_model(model, calibration, workdir)
        seconds = {"float": time.perf_counter() - begun}
        begun = time.perf_counter()
        wide = [name for name in layers if plan.layers.get(name) is Precision.INT16]
        request = _Request(
            precision=precision,
            floating=float_file.nodes_of([name for name in (*layers, *deciding) if name not in wide], model),
            wide=float_file.nodes_of(wide, model),
            guard=plan.guard,
        )
        made, file = _final_file(float_file, request, calibration, workdir)
        seconds["quantize" if precision is Precision.INT8 else "convert"] = time.perf_counter() - begun
        besides = float_file.layers_of(made.floating, model)
        inputs, outputs = _specs(given, model, float_file, made)
        return Lowered(
            files={ENTRY: file},
            entry=ENTRY,
            inputs=inputs,
            outputs=outputs,
            runtimes=_runtimes(made),
            verified=Verified.EXECUTED,
            tools=toolchain_client.versions(),
            runtime_options={name: options[name] for name in ("threads",) if name in options},
            seconds=seconds | made.seconds,
            notes=(*notes, *_notes(made, precision, besides), *_coarse(model, float_file, made)),
            calibration_samples=made.samples,
            floating=tuple(name for name in dict.fromkeys((*besides, *deciding)) if name not in layers),
        )

    def numbers(self, files: Mapping[str, Path], shapes: Mapping[str, Sequence[int]]) -> Numbers | None:
        """See :meth:`kedge_targets.contract.Compiler.numbers`."""
        return counting.numbers(files[ENTRY])


def _check(plan: Plan, precision: Precision, target: Target) -> None:
    if precision is Precision.INT16:
        raise LoweringError(
            "activations of 16 bits are for single layers beside int8",
            where=f"target {target.name!r}",
            remedy="Take int8 for the others",
        )
    if precision is not Precision.INT8 and len(plan.precisions) > 1:
        raise LoweringError(
            f"TensorFlow's converter gives all layers one precision beside {precision.value}",
            where=f"target {target.name!r}",
            remedy="Leave single layers in float beside int8 alone",
        )
    if precision is Precision.INT8 and plan.scheme not in (None, _QUANTIZED):
        raise LoweringError(f"cannot quantize so: {plan.scheme}", where=f"target {target.name!r}")


@dataclass(frozen=True, kw_only=True)
class _Request:
    """What the final file is to be: its precision, and nodes of the converter's graph that differ."""

    precision: Precision
    floating: list[str]
    wide: list[str]
    guard: bool


def _final_file(found: FloatFile, asked: _Request, calibration: Calibration, workdir: Path) -> tuple[Converted, Path]:
    file = workdir / ENTRY
    precision = asked.precision
    if precision is Precision.FLOAT32:
        return found.made, found.file.rename(file)
    request = ConvertRequest(
        graph=str(found.graph), keep=found.keep, plain=found.plain, precision=precision.value, file=str(file)
    )
    if not precision.needs_calibration:
        return toolchain_client.convert(request), file
    paths = [workdir / f"calibration-{index}.npy" for index in range(len(found.made.inputs))]
    try:
        samples = _write_calibration(found, calibration, paths)
        request = ConvertRequest(
            graph=request.graph,
            keep=request.keep,
            plain=request.plain,
            precision=request.precision,
            file=request.file,
            calibration=[str(path) for path in paths],
            samples=samples,
            group=found.batch,
            orders=found.orders,
            floating=asked.floating,
            wide=asked.wide,
            guard=asked.guard,
        )
        return toolchain_client.convert(request), file
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


def _write_calibration(found: FloatFile, calibration: Calibration, paths: Sequence[Path]) -> int:
    """Write the samples in the file's layout, one array for each input of the file, in its order, with one sample in
    memory at a time. Return their number."""
    tensors = found.made.inputs
    groups = -(-calibration.samples // found.batch)
    try:
        files = [path.open("wb") for path in paths]
    except OSError as error:
        raise StorageError(f"cannot be written: {error.strerror}", where=str(paths[0])) from error
    try:
        for file, tensor in zip(files, tensors, strict=True):
            shape = (groups * found.batch, *tensor.shape[1:])
            header = {"descr": np.dtype(tensor.dtype).str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
        written = 0
        for arrays in _in_layout(found, calibration, tensors):
            for file, array in zip(files, arrays, strict=True):
                file.write(array.tobytes())
            written += 1
        for file in files:
            file.flush()
    except OSError as error:
        raise StorageError(f"cannot be written: {error.strerror}", where=str(paths[0].parent)) from error
    finally:
        for file in files:
            file.close()
    if written != groups:
        raise LoweringError(f"{calibration.samples} calibration samples were announced, {written} came")
    return groups * found.batch


def _in_layout(found: FloatFile, calibration: Calibration, tensors: Sequence[ConvertedTensor]) -> Iterator[list[Array]]:
    names = [info.name for info in signature.inputs(found.prepared)]
    at = [found.made.input_order.index(position) for position in range(len(tensors))]
    for sample in batch.regroup(iter(calibration), found.batch):
        yield [
            np.ascontiguousarray(
                np.asarray(sample[names[index]]).transpose(found.match.inputs[index]), dtype=tensor.dtype
            )
            for index, tensor in zip(at, tensors, strict=True)
        ]


def _specs(
    given: onnx.ModelProto, model: onnx.ModelProto, found: FloatFile, made: Converted
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Return the model's tensors with those of the file. The float file's tensors, whose axes are known, are found in
    the final one by name.

    Args:
        given: the model that the caller knows: a float16 model has float16 inputs and outputs, whatever the file has.
    """
    own = {info.name: info.dtype for info in (*signature.inputs(given), *signature.outputs(given))}
    at_input = {tensor.name: index for index, tensor in enumerate(made.inputs)}
    at_output = {tensor.name: index for index, tensor in enumerate(made.outputs)}
    inputs = []
    for info, position, order in zip(signature.inputs(model), found.made.input_order, found.match.inputs, strict=True):
        index = _same(found.made.inputs[position], at_input)
        inputs.append(_spec(replace(info, dtype=own[info.name]), made.inputs[index], index, order))
    outputs = []
    for info, (position, order) in zip(signature.outputs(model), found.match.outputs, strict=True):
        index = _same(found.made.outputs[position], at_output)
        outputs.append(_spec(replace(info, dtype=own[info.name]), made.outputs[index], index, order))
    return tuple(inputs), tuple(outputs)


def _same(tensor: ConvertedTensor, positions: Mapping[str, int]) -> int:
    if tensor.name not in positions:
        raise LoweringError(f"the converter renamed its tensor {tensor.name!r} to one of {sorted(positions)}")
    return positions[tensor.name]


def _spec(info: signature.TensorInfo, tensor: ConvertedTensor, index: int, order: Sequence[int]) -> TensorSpec:
    same_axes = list(order) == sorted(order)
    return TensorSpec(
        name=info.name,
        shape=info.shape,
        dtype=info.dtype,
        layout=info.layout,
        file=FileTensor(
            name=tensor.name,
            index=index,
            shape=tensor.shape,
            dtype=tensor.dtype,
            permutation=None if same_axes else tuple(order),
            scale=tensor.scale,
            zero_point=tensor.zero_point,
        ),
    )


def _runtimes(made: Converted) -> tuple[RuntimeRequirement, ...]:
    """Return the runtimes that have the file's operators."""
    needed = _version(made.minimum_runtime)
    return tuple(
        RuntimeRequirement(distribution=name, minimum=minimum)
        for name, minimum in _RUNTIMES
        # LiteRT counts anew from 1.0 and has all that TensorFlow's converter writes.
        if name == _RUNTIMES[0][0] or needed <= _version(minimum)
    )


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def _notes(made: Converted, precision: Precision, besides: Sequence[str]) -> tuple[str, ...]:
    if precision is not Precision.INT8 or not made.float_operators:
        return ()
    kinds = ", ".join(sorted(set(made.float_operators)))
    found = [f"{len(made.float_operators)} of {made.operators} operators stay in float: {kinds}"]
    if besides:
        names = ", ".join(besides[:_NAMED]) + (" …" if len(besides) > _NAMED else "")
        found.append(f"kept in float because an output would not hold otherwise, or one scale not do for all: {names}")
    return tuple(found)


def _coarse(model: onnx.ModelProto, found: FloatFile, made: Converted) -> tuple[str, ...]:
    """Return notes on int8 outputs that are far from float on calibration samples."""
    if not made.decibels:
        return ()
    at = {tensor.name: index for index, tensor in enumerate(made.outputs)}
    notes = []
    for info, (position, _) in zip(signature.outputs(model), found.match.outputs, strict=True):
        decibels = made.decibels[_same(found.made.outputs[position], at)]
        if decibels is not None and decibels < _COARSE:
            notes.append(
                f"output {info.name!r} is coarse in int8: {decibels:.1f} dB against float on calibration samples, "
                f"{_COARSE:.0f} are usual; keep the layers in float that suffer most"
            )
    return tuple(notes)
