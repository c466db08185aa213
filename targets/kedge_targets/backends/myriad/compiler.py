"""Lowers models for Myriad X: the FP16 representation by today's OpenVINO, blobs by the old compiler in a separate
toolchain."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedge_protocol.bundle.config import FileTensor, RuntimeRequirement, TensorSpec, Verified
from kedge_protocol.errors import (
    ConfigError,
    LoweringError,
    TargetError,
    UnsupportedOperatorError,
)
from kedge_targets.backends.myriad import camera, downgrade, processor, representation, toolchain_client
from kedge_targets.backends.myriad.origins import Origins
from kedge_targets.backends.myriad.runtime import OAK, SHAVES, check_device
from kedge_targets.backends.openvino import library
from kedge_targets.backends.openvino.library import reason_of
from kedge_targets.backends.openvino.runtime import Runtime as Representation
from kedge_targets.compiler_template import CompilerTemplate, LoweringJob
from kedge_targets.contract import Lowered
from kedge_targets.graph import batch, free_dimensions, model_reader, model_writer, plan_layers, signature
from kedge_targets.numerics import Numerics, Precision, QuantizationScheme
from kedge_targets.target import Target

if TYPE_CHECKING:
    import onnx

_KNOWN_OPTIONS = frozenset({"device", "shaves"})
_FIRST_DEPTHAI = "3.0"
_STICKS_RELEASE = "2022.3"
_WIRE = {"f32": "FP16", "f16": "FP16", "u8": "U8F", "i32": "INT", "i64": "INT"}
_DTYPES = {"f32": "float32", "f16": "float16", "u8": "uint8", "i32": "int32", "i64": "int64"}
_MOST_AXES = 4
_FEEDERS = frozenset({"Parameter", "Constant", "Convert"})


class Compiler(CompilerTemplate):
    """Compiles with today's ONNX reader of OpenVINO and the Myriad compiler of release 2021.4.

    Options of a target's file:
        device, shaves: see :class:`kedge_targets.backends.myriad.runtime.Runtime`.
    """

    tools = "OpenVINO's tools"
    modules = ("onnx", *Representation.distributions)
    toolchain = toolchain_client.NAME
    no_decoders = "a Myriad X runs blobs of fixed shapes, and a text grows"
    known_options = _KNOWN_OPTIONS

    @property
    def numerics(self) -> Numerics:
        """See :meth:`kedge_targets.contract.Compiler.numerics`. A Myriad X computes only in FP16."""
        return Numerics(precisions=(Precision.FLOAT16,), schemes=(), mixed=False, layouts=("NCHW",))

    def verification(self, target: Target) -> Verified:
        """See :meth:`kedge_targets.contract.Compiler.verification`."""
        return Verified.COMPILED

    def quantized_for(self, target: Target) -> tuple[QuantizationScheme, ...]:
        """See :meth:`kedge_targets.contract.Compiler.quantized_for`."""
        return ()

    def check(self, job: LoweringJob) -> None:
        """See :meth:`kedge_targets.compiler_template.CompilerTemplate.check`."""
        _check_options(job.options, job.target)

    def reason_of(self, error: Exception) -> str:
        """See :meth:`kedge_targets.compiler_template.CompilerTemplate.reason_of`."""
        return reason_of(error)

    def lower_job(self, job: LoweringJob) -> Lowered:
        """See :meth:`kedge_targets.compiler_template.CompilerTemplate.lower_job`."""
        graph, plan = job.graph, job.plan
        given = model_reader.load(graph)
        if plan_layers.leading(plan) is not Precision.FLOAT16 or plan_layers.others(plan, given, Precision.FLOAT16):
            raise LoweringError("a Myriad X computes in float16 only", where=f"target {job.target.name}")
        given, fixed = free_dimensions.settle(given, job.calibration, device="a Myriad X")
        if fixed:
            graph = job.workdir / "fixed.onnx"
            model_writer.save(given, graph)
        made = _lower(graph, given, options=job.options, workdir=job.workdir)
        return replace(made, notes=(*fixed, *made.notes))


def _check_options(options: Mapping[str, Any], target: Target) -> None:
    where = f"target {target.name}, options"
    try:
        check_device(options.get("device", OAK), options.get("shaves", SHAVES[0]))
    except ConfigError as error:
        raise TargetError(error.what, where=where, remedy=error.remedy) from error


def _lower(graph: Path, given: onnx.ModelProto, *, options: Mapping[str, Any], workdir: Path) -> Lowered:
    openvino = library.load()
    model = _read(openvino, graph, given)
    kept = {node.name for node in given.graph.node} | {name for node in given.graph.node for name in node.output}
    kept |= {info.name for info in signature.inputs(given)}
    representation.rename(model, kept)
    origins = Origins(model, given)
    replaced = downgrade.downgrade(model, origins.node_of)
    cut = representation.halve(model)
    files = representation.save(model, workdir, names=kept)
    inputs = [port.get_node().get_friendly_name() for port in model.inputs]
    outputs = [processor.made_by(port) for port in model.outputs]
    seconds = {}
    with toolchain_client.driver() as driver:
        tools = driver.versions()
        begun = time.perf_counter()
        _check_taken(driver.unsupported(files[representation.ENTRY]), origins)
        seconds["query"] = time.perf_counter() - begun
        begun = time.perf_counter()
        made = driver.compile(files[representation.ENTRY], SHAVES, workdir)
        seconds["compile"] = time.perf_counter() - begun
    for blob in made:
        _check_blob(blob, model, inputs, outputs)
        files[Path(blob.file).name] = Path(blob.file)
    specs_in = _specs(signature.inputs(given), model.inputs)
    specs_out = _specs(signature.outputs(given), model.outputs)
    return Lowered(
        files=files,
        entry=representation.ENTRY,
        inputs=specs_in,
        outputs=specs_out,
        runtimes=_runtimes(str(options.get("device", OAK))),
        verified=Verified.COMPILED,
        tools={
            openvino.__name__: openvino.__version__.split("-")[0],
            "myriad-compiler": tools[openvino.__name__],
            camera.DISTRIBUTION: tools[camera.DISTRIBUTION],
        },
        runtime_options={
            **options,
            "inputs": inputs,
            "outputs": [
                [name, list(spec.file.shape), spec.file.dtype] for name, spec in zip(outputs, specs_out, strict=True)
            ],
        },
        seconds=seconds,
        notes=_notes(made, replaced, cut),
    )


def _read(openvino: Any, graph: Path, given: onnx.ModelProto) -> Any:
    """Return the graph with all shapes fixed; a dynamic batch becomes 1."""
    try:
        # Not convert_model, which lets newer operation sets in.
        model = openvino.Core().read_model(str(graph))
    except Exception as error:  # the library raises RuntimeError and its own, without a common base
        raise LoweringError(f"OpenVINO cannot read the graph: {reason_of(error)}", where=graph.name) from error
    samples = batch.size(given) or 1
    model.reshape({info.name: [samples, *info.shape[1:]] for info in signature.inputs(given)})
    from openvino.passes import ConstantFolding, Manager

    manager = Manager()
    manager.register_pass(ConstantFolding())
    manager.run_passes(model)
    for kind, ports in (("input", model.inputs), ("output", model.outputs)):
        for port in ports:
            _check_port(kind, port)
    return model


def _check_port(kind: str, port: Any) -> None:
    where = f"{kind} {port.get_any_name()!r}"
    if port.get_partial_shape().is_dynamic:
        raise LoweringError(
            f"a Myriad X takes fixed shapes only, and this is {port.get_partial_shape()}",
            where=where,
            remedy="Export the model so that no shape depends on values",
        )
    if not 0 < len(port.get_shape()) <= _MOST_AXES:
        raise LoweringError(f"has {len(port.get_shape())} axes, a blob takes 1 to {_MOST_AXES}", where=where)
    if port.get_element_type().get_type_name() not in _WIRE:
        raise LoweringError(
            f"holds {port.get_element_type().get_type_name()}, a blob takes {', '.join(_WIRE)}", where=where
        )


def _check_taken(unsupported: tuple[toolchain_client.Layer, ...], origins: Origins) -> None:
    if not unsupported:
        return
    # What feeds such a layer is named too, where nothing else uses it.
    layer, *others = [layer for layer in unsupported if layer.type not in _FEEDERS] or unsupported
    more = f"; and {len(others)} more: {', '.join(other.name for other in others[:5])}" if others else ""
    raise UnsupportedOperatorError(
        f"the Myriad compiler does not take layer {layer.name!r} ({layer.type}){more}",
        where=f"node {origins.node_of(layer.name)!r}",
        remedy="Export the model with another operator in its place, or choose another target",
    )


def _check_blob(blob: toolchain_client.Blob, model: Any, inputs: list[str], outputs: list[str]) -> None:
    """Check that what depthai reads in the blob matches the representation's inputs and outputs."""
    for kind, names, ports, found in (
        ("input", inputs, model.inputs, blob.inputs),
        ("output", outputs, model.outputs, blob.outputs),
    ):
        there = {tensor.name: tensor for tensor in found}
        for name, port in zip(names, ports, strict=True):
            tensor = there.pop(name, None)
            wanted = tuple(port.get_shape()), _WIRE[port.get_element_type().get_type_name()]
            if tensor is None or (tensor.shape, tensor.dtype) != wanted:
                raise LoweringError(
                    f"the blob for {blob.shaves} SHAVEs has {tensor}, the model has {wanted}", where=f"{kind} {name!r}"
                )
        if there:
            raise LoweringError(f"the blob for {blob.shaves} SHAVEs has an {kind} too many: {sorted(there)}")


def _specs(infos: list[signature.TensorInfo], ports: list[Any]) -> tuple[TensorSpec, ...]:
    by_name = {name: index for index, port in enumerate(ports) for name in port.get_names()}
    made = []
    for info in infos:
        index = by_name[info.name]
        port = ports[index]
        file = FileTensor(
            name=info.name,
            index=index,
            shape=tuple(port.get_shape()),
            dtype=_DTYPES[port.get_element_type().get_type_name()],
        )
        made.append(TensorSpec(name=info.name, shape=info.shape, dtype=info.dtype, layout=info.layout, file=file))
    return tuple(made)


def _runtimes(device: str) -> tuple[RuntimeRequirement, ...]:
    """Return the runtimes: first the device's own library; the other runs the representation on a CPU."""
    representation = [
        RuntimeRequirement(distribution=name, minimum=_STICKS_RELEASE) for name in Representation.distributions
    ]
    camera_library = RuntimeRequirement(distribution=camera.DISTRIBUTION, minimum=_FIRST_DEPTHAI)
    return (camera_library, *representation) if device == OAK else tuple(representation)


def _notes(made: tuple[toolchain_client.Blob, ...], replaced: list[str], cut: int) -> tuple[str, ...]:
    notes = [
        "accuracy and latency are of the FP16 file on this host's CPU with float32 sums; no Myriad X was there",
        "blobs parsed by depthai: " + ", ".join(f"{blob.shaves} SHAVEs, {blob.stages} stages" for blob in made),
    ]
    if replaced:
        notes.append(f"brought down to older operators: {', '.join(replaced)}")
    if cut:
        notes.append(f"{cut} constants beyond FP16's range are its largest number now")
    return tuple(notes)
