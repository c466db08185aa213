"""Lowering for LiteRT: ONNX to TensorFlow by onnx2tf, to .tflite by TensorFlow, both in a toolchain of their own."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.bundle.config import FileTensor, RuntimeRequirement, TensorSpec, Verified
from kedge_protocol.errors import (
    LoweringError,
    MissingDependencyError,
    StorageError,
    TargetError,
)
from kedge_protocol.packages import pip_install
from kedge_targets import contract, toolchain
from kedge_targets.backends.tflite import axes, conversion, counting, prepare
from kedge_targets.backends.tflite.conversion import Converted, ConvertedTensor, ConvertRequest
from kedge_targets.backends.tflite.runtime import BUILTIN, Runtime
from kedge_targets.contract import Calibration, Lowered
from kedge_targets.graph import batch, library, reading, signature, sizes, writing
from kedge_targets.numbers import Numbers
from kedge_targets.numerics import Granularity, Numerics, Plan, Precision, QuantizedType
from kedge_targets.target import Target

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]

ENTRY = "model.tflite"

_QUANTIZED = QuantizedType(
    activation="int8", weight="int8", symmetric_activation=False, granularity=Granularity.PER_CHANNEL
)
_RUNTIMES = (("ai-edge-litert", "2.1"), ("tflite-runtime", "2.14.0"))
_KNOWN_OPTIONS = frozenset({"threads"})
_REAL_PROBES = 2
_AGREES = 0.01  # relative error of the float file against the ONNX graph; a wrong order of axes is far beyond


class Compiler(contract.Compiler):
    """TensorFlow's converter, fed by onnx2tf.

    Options of a target's file:
        threads: see :class:`kedge_targets.backends.tflite.runtime.Runtime`.
    """

    @property
    def numerics(self) -> Numerics:
        """See :meth:`kedge_targets.contract.Compiler.numerics`."""
        return Numerics(
            precisions=(Precision.INT8, Precision.INT8_DYNAMIC, Precision.FLOAT16, Precision.FLOAT32),
            quantized=(_QUANTIZED,),
            mixed=False,
            layouts=("NHWC",),
        )

    def missing(self) -> str | None:
        """See :meth:`kedge_targets.contract.Compiler.missing`."""
        if importlib.util.find_spec("onnx") is None:
            return f"onnx is missing: {pip_install('compile')}"
        try:
            library.load()
            Runtime().check()
            toolchain.find(conversion.NAME)
        except MissingDependencyError as error:
            return str(error)
        return None

    def verification(self, target: Target) -> Verified:
        """See :meth:`kedge_targets.contract.Compiler.verification`."""
        return Verified.EXECUTED

    def quantized_for(self, target: Target) -> tuple[QuantizedType, ...]:
        """See :meth:`kedge_targets.contract.Compiler.quantized_for`."""
        return (_QUANTIZED,)

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
        _check(plan, options, target)
        if plan.default is Precision.INT8 and not calibration.samples:
            raise LoweringError("there are no calibration samples", remedy="Give at least one; some hundred are usual")
        toolchain.find(conversion.NAME)
        conversion.start()
        begun = time.perf_counter()
        model, fixed = sizes.settled(reading.load(graph), calibration, device="TFLite")
        float_file = _float_file(model, calibration, workdir)
        seconds = {"float": time.perf_counter() - begun}
        begun = time.perf_counter()
        made, file = _final_file(float_file, plan.default, calibration, workdir)
        seconds["quantize" if plan.default is Precision.INT8 else "convert"] = time.perf_counter() - begun
        inputs, outputs = _specs(model, float_file, made)
        return Lowered(
            files={ENTRY: file},
            entry=ENTRY,
            inputs=inputs,
            outputs=outputs,
            runtimes=_runtimes(made),
            verified=Verified.EXECUTED,
            tools=conversion.versions(),
            runtime_options={name: options[name] for name in ("threads",) if name in options},
            seconds=seconds | made.seconds,
            notes=(*fixed, *_notes(made, plan.default)),
            calibration_samples=made.samples,
        )

    def numbers(self, files: Mapping[str, Path], shapes: Mapping[str, Sequence[int]]) -> Numbers | None:
        """See :meth:`kedge_targets.contract.Compiler.numbers`."""
        return counting.numbers(files[ENTRY])


@dataclass(frozen=True)
class _FloatFile:
    """The graph in float, with how its axes belong to the model's."""

    graph: Path
    keep: list[str]
    file: Path
    made: Converted
    match: axes.Match
    batch: int


def _check(plan: Plan, options: Mapping[str, Any], target: Target) -> None:
    if unknown := sorted(set(options) - _KNOWN_OPTIONS):
        raise TargetError(
            f"unknown option {unknown[0]!r}",
            where=f"target {target.name!r}",
            remedy=f"Known are {sorted(_KNOWN_OPTIONS)}",
        )
    if any(precision is not plan.default for precision in plan.layers.values()):
        raise LoweringError("TensorFlow's converter gives all layers one precision", where=f"target {target.name!r}")
    if plan.default is Precision.INT8 and plan.quantized not in (None, _QUANTIZED):
        raise LoweringError(f"cannot quantize so: {plan.quantized}", where=f"target {target.name!r}")


def _float_file(model: onnx.ModelProto, calibration: Calibration, workdir: Path) -> _FloatFile:
    """The float file and its axes.

    onnx2tf guesses where axes went by their sizes, and where sizes repeat it may guess wrong. What it made is compared
    with the ONNX graph; where they differ, it gets the graph in another form: not folded, with all its inputs left as
    they are, with none.
    """
    probes = _probes(model, calibration)
    first_error: LoweringError | None = None
    for graph, keep in _attempts(model, workdir):
        try:
            return _matched(graph, keep, workdir / "float32.tflite", probes)
        except LoweringError as error:
            first_error = first_error or error
    raise first_error or LoweringError("there is no way to convert the graph")


def _attempts(model: onnx.ModelProto, workdir: Path) -> Iterator[tuple[Path, list[str]]]:
    """Graphs to convert, each with the inputs whose axes must stay; the likeliest to be right first."""
    folded, graph = prepare.prepared(model), workdir / "folded.onnx"
    writing.save(folded, graph)
    keep = prepare.kept_inputs(folded)
    yield graph, keep
    plain = prepare.prepared(model, fold=False)
    writing.save(plain, workdir / "plain.onnx")
    yield workdir / "plain.onnx", prepare.kept_inputs(plain)
    every = [info.name for info in signature.inputs(folded)]
    for other in (every, []):
        if other != keep:
            yield graph, other


def _matched(graph: Path, keep: list[str], file: Path, probes: list[axes.Probe]) -> _FloatFile:
    request = ConvertRequest(graph=str(graph), keep=keep, precision=Precision.FLOAT32.value, file=str(file))
    made = conversion.convert(request)
    session = Runtime().load(file, {}, kernel_set=BUILTIN)
    try:
        found = axes.match(session, [tensor.shape for tensor in made.inputs], made.input_order, probes)
    finally:
        session.close()
    if found is None or found.error > _AGREES:
        how = "no order of axes fits" if found is None else f"the best order of axes is {found.error:.2g} off"
        raise LoweringError(
            f"the converted float model does not compute what the ONNX graph computes: {how}",
            where=graph.name,
            remedy="Choose a target with another backend for this model",
        )
    return _FloatFile(graph, keep, file, made, found, int(probes[0].inputs[0].shape[0]) if probes[0].inputs else 1)


def _probes(model: onnx.ModelProto, calibration: Calibration) -> list[axes.Probe]:
    """Runs of the ONNX graph itself: on real samples, and on noise like them."""
    onnxruntime = library.load()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        reference = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library's errors have no common base but Exception
        raise LoweringError(f"ONNX Runtime cannot load the graph: {error}") from error
    given = signature.inputs(model)
    names = [info.name for info in signature.outputs(model)]
    samples: list[dict[str, Array]] = []
    for sample in batch.grouped(iter(calibration), batch.size(model)):
        samples.append({info.name: np.asarray(sample[info.name], dtype=info.dtype) for info in given})
        if len(samples) == _REAL_PROBES:
            break
    if not samples:
        samples = [axes.made_up(given)]
    probes = []
    for sample in [*samples, axes.noise_like(samples[0], seed=0)]:
        outputs = reference.run(names, sample)
        if all(np.isfinite(output).all() for output in outputs if output.dtype.kind == "f"):
            probes.append(axes.Probe([sample[info.name] for info in given], outputs))
    if not probes:
        raise LoweringError("the model answers NaN or infinity to its own calibration samples")
    return probes


def _final_file(
    found: _FloatFile, precision: Precision, calibration: Calibration, workdir: Path
) -> tuple[Converted, Path]:
    file = workdir / ENTRY
    if precision is Precision.FLOAT32:
        return found.made, found.file.rename(file)
    request = ConvertRequest(graph=str(found.graph), keep=found.keep, precision=precision.value, file=str(file))
    if not precision.needs_calibration:
        return conversion.convert(request), file
    paths = [workdir / f"calibration-{index}.npy" for index in range(len(found.made.inputs))]
    try:
        samples = _write_calibration(found, calibration, paths)
        request = ConvertRequest(
            graph=request.graph,
            keep=request.keep,
            precision=request.precision,
            file=request.file,
            calibration=[str(path) for path in paths],
            samples=samples,
            group=found.batch,
        )
        return conversion.convert(request), file
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


def _write_calibration(found: _FloatFile, calibration: Calibration, paths: Sequence[Path]) -> int:
    """Write the samples in the file's layout, one array for each input of the file, in its order; one sample in
    memory at a time. Returns how many there are."""
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


def _in_layout(
    found: _FloatFile, calibration: Calibration, tensors: Sequence[ConvertedTensor]
) -> Iterator[list[Array]]:
    names = [info.name for info in signature.inputs(reading.load(found.graph))]
    at = [found.made.input_order.index(position) for position in range(len(tensors))]
    for sample in batch.grouped(iter(calibration), found.batch):
        yield [
            np.ascontiguousarray(
                np.asarray(sample[names[index]]).transpose(found.match.inputs[index]), dtype=tensor.dtype
            )
            for index, tensor in zip(at, tensors, strict=True)
        ]


def _specs(
    model: onnx.ModelProto, found: _FloatFile, made: Converted
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The model's tensors with what the file really has. The float file's tensors, whose axes are known, are found
    in the final one by name."""
    at_input = {tensor.name: index for index, tensor in enumerate(made.inputs)}
    at_output = {tensor.name: index for index, tensor in enumerate(made.outputs)}
    inputs = []
    for info, position, order in zip(signature.inputs(model), found.made.input_order, found.match.inputs, strict=True):
        index = _same(found.made.inputs[position], at_input)
        inputs.append(_spec(info, made.inputs[index], index, order))
    outputs = []
    for info, (position, order) in zip(signature.outputs(model), found.match.outputs, strict=True):
        index = _same(found.made.outputs[position], at_output)
        outputs.append(_spec(info, made.outputs[index], index, order))
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
    """The runtimes that have the file's operators."""
    needed = _version(made.minimum_runtime)
    return tuple(
        RuntimeRequirement(distribution=name, minimum=minimum)
        for name, minimum in _RUNTIMES
        # LiteRT counts anew from 1.0 and has all that TensorFlow's converter writes.
        if name == _RUNTIMES[0][0] or needed <= _version(minimum)
    )


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def _notes(made: Converted, precision: Precision) -> tuple[str, ...]:
    if precision is not Precision.INT8 or not made.float_operators:
        return ()
    kinds = ", ".join(sorted(set(made.float_operators)))
    return (f"{len(made.float_operators)} of {made.operators} operators stay in float: {kinds}",)
