"""Lowers models for ncnn by pnnx, in a toolchain of its own, and compares the result with the ONNX graph."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.bundle.config import FileTensor, RuntimeRequirement, TensorSpec, Verified
from kedge_protocol.errors import LoweringError, MissingDependencyError, UnsupportedOperatorError
from kedge_protocol.packages import pip_install
from kedge_targets.backends.ncnn.runtime import WEIGHTS, Runtime, has_layer
from kedge_targets.compiler_template import CompilerTemplate, LoweringJob
from kedge_targets.contract import Calibration, Lowered
from kedge_targets.graph import (
    batch,
    canonicalization,
    dequantization,
    free_dimensions,
    library,
    model_reader,
    model_writer,
    signature,
)
from kedge_targets.numerics import Numerics, Precision, QuantizationScheme
from kedge_targets.target import Target
from kedge_targets.toolchain.client import ToolchainClient

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]

NAME = "ncnn"
ENTRY = "model.param"
_VERSION = "1.0.20261020"
_START_SECONDS, _CONVERT_SECONDS = 120.0, 1000.0
_PROBES = 3
_AGREES, _AGREES_HALF = 1e-3, 2e-2
_OTHERWISE = "Export the model with other operators in its place, or choose a target with another backend"

_client = ToolchainClient(NAME, start_seconds=_START_SECONDS)


@dataclass(frozen=True, kw_only=True)
class ConvertRequest:
    """See the task ``convert`` in ``toolchain/driver.py``."""

    graph: str
    shapes: list[list[int]]
    half: bool
    param: str
    weights: str


@dataclass(frozen=True, kw_only=True)
class Converted:
    """The driver's answer: names in the file, and (kind, name) of each layer."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layers: tuple[tuple[str, str], ...]


class Compiler(CompilerTemplate):
    """Compiles with pnnx: weights in float16 or float32, computed in float32.

    Options of a target's file:
        threads: see :class:`kedge_targets.backends.ncnn.runtime.Runtime`.
    """

    tools = "pnnx"
    toolchain = NAME
    no_decoders = "no decoders are written for ncnn"
    known_options = frozenset({"threads"})

    @property
    def numerics(self) -> Numerics:
        """See :meth:`kedge_targets.contract.Compiler.numerics`."""
        return Numerics(precisions=(Precision.FLOAT16, Precision.FLOAT32), schemes=(), mixed=False, layouts=("NCHW",))

    def require_tools(self) -> None:
        """See :meth:`kedge_targets.compiler_template.CompilerTemplate.require_tools`."""
        library.load()
        try:
            Runtime().check()
        except MissingDependencyError as error:
            raise MissingDependencyError(error.what, remedy=f"Install it with {pip_install('ncnn')}") from error
        super().require_tools()

    def verification(self, target: Target) -> Verified:
        """See :meth:`kedge_targets.contract.Compiler.verification`."""
        return Verified.EXECUTED

    def quantized_for(self, target: Target) -> tuple[QuantizationScheme, ...]:
        """See :meth:`kedge_targets.contract.Compiler.quantized_for`."""
        return ()

    def lower_job(self, job: LoweringJob) -> Lowered:
        """See :meth:`kedge_targets.compiler_template.CompilerTemplate.lower_job`."""
        begun = time.perf_counter()
        given = model_reader.load(job.graph)
        model, fixed = free_dimensions.settle(given, job.calibration, device="ncnn")
        calibration = free_dimensions.FilledCalibration(job.calibration, model)
        model, taken = dequantization.restored(model, calibration)
        model = batch.fix_batch(canonicalization.in_float32(model), 1)
        _check_ends(given, model)
        graph = job.workdir / "graph.onnx"
        model_writer.save(model, graph)
        half = job.plan.default is Precision.FLOAT16
        entry = job.workdir / ENTRY
        weights = entry.with_suffix(WEIGHTS)
        shapes = [[int(size or 1) for size in info.shape] for info in signature.inputs(model)]
        request = ConvertRequest(graph=str(graph), shapes=shapes, half=half, param=str(entry), weights=str(weights))
        made = _client.call("convert", request, Converted, deadline=_CONVERT_SECONDS)
        _check_layers(made, model)
        places = _compare(model, entry, calibration, _AGREES_HALF if half else _AGREES)
        graph.unlink()
        inputs, outputs = signature.inputs(given), signature.outputs(given)
        exact = signature.outputs(model)
        return Lowered(
            files={ENTRY: entry, weights.name: weights},
            entry=ENTRY,
            inputs=_specs(inputs, shapes, made.inputs, range(len(inputs))),
            outputs=_specs(outputs, [[int(size or 1) for size in info.shape] for info in exact], made.outputs, places),
            runtimes=(RuntimeRequirement(distribution="ncnn", minimum=_VERSION),),
            verified=Verified.EXECUTED,
            tools=_client.versions(),
            runtime_options=dict(job.options),
            seconds={"convert": time.perf_counter() - begun},
            notes=(*fixed, *taken),
        )


def _check_ends(given: onnx.ModelProto, model: onnx.ModelProto) -> None:
    """Refuse inputs and outputs that ncnn cannot have."""
    if (batch.size(given) or 1) != 1:
        raise LoweringError("ncnn runs one sample in a call, the model several", remedy="Export it with a free batch")
    for kind, tensors in (("input", signature.inputs(model)), ("output", signature.outputs(model))):
        for info in tensors:
            if info.dtype != "float32" or not 2 <= len(info.shape) <= 5:
                raise LoweringError(
                    f"ncnn has tensors of floats with one to four axes beside the batch; this has {info.dtype}, "
                    f"{len(info.shape)} axes",
                    where=f"{kind} {info.name!r}",
                    remedy="Choose a target with another backend",
                )


def _check_layers(made: Converted, model: onnx.ModelProto) -> None:
    for kind, name in made.layers:
        if not has_layer(kind):
            raise UnsupportedOperatorError(f"ncnn has no layer for {kind}", where=f"layer {name!r}", remedy=_OTHERWISE)
    ends = len(signature.inputs(model)), len(signature.outputs(model))
    if (len(made.inputs), len(made.outputs)) != ends:
        raise LoweringError(
            f"pnnx made {len(made.inputs)} inputs and {len(made.outputs)} outputs of {ends[0]} and {ends[1]}",
            remedy=_OTHERWISE,
        )


def _compare(model: onnx.ModelProto, entry: Path, calibration: Calibration, agrees: float) -> list[int]:
    """Return each output's position in the file: pnnx sorts them its own way. Raise if the files do not compute what
    the ONNX graph computes, on samples."""
    session = Runtime().load(entry, {})
    reference = library.load().InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    inputs, outputs = signature.inputs(model), [info.name for info in signature.outputs(model)]
    off = np.zeros((len(outputs), len(outputs)))
    try:
        for feed in _probes(inputs, calibration):
            got = session.run([feed[info.name] for info in inputs])
            for row, wanted in enumerate(reference.run(outputs, feed)):
                off[row] = np.maximum(off[row], [_off(wanted, answer) for answer in got])
    finally:
        session.close()
    positions: list[int] = []
    for row, name in enumerate(outputs):
        free = [at for at in range(len(outputs)) if at not in positions]
        nearest = min(free, key=lambda at: float(off[row, at]))
        if not off[row, nearest] <= agrees:
            raise LoweringError(
                f"ncnn's files do not compute what the ONNX graph computes: output {name!r} is "
                f"{off[row, nearest]:.2g} of its size off",
                remedy="Choose a target with another backend for this model",
            )
        positions.append(nearest)
    return positions


def _probes(inputs: Sequence[signature.TensorInfo], calibration: Calibration) -> list[dict[str, Array]]:
    """Return calibration samples; without any, noise."""
    found = []
    for sample in calibration:
        found.append({info.name: np.asarray(sample[info.name], np.float32)[:1] for info in inputs})
        if len(found) == _PROBES:
            return found
    if found:
        return found
    source = np.random.default_rng(0)
    shapes = {info.name: [size or 1 for size in info.shape] for info in inputs}
    return [{name: source.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}]


def _off(wanted: Array, got: Array) -> float:
    """Return the root mean square of the difference, relative to the reference's; infinite for another shape."""
    if wanted.shape != got.shape or not np.isfinite(got).all():
        return math.inf
    size = math.sqrt(float(np.mean(wanted.astype(np.float64) ** 2))) or 1.0
    return math.sqrt(float(np.mean((wanted.astype(np.float64) - got) ** 2))) / size


def _specs(
    tensors: Sequence[signature.TensorInfo],
    shapes: Sequence[Sequence[int]],
    names: Sequence[str],
    places: Sequence[int],
) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            name=info.name,
            shape=info.shape,
            dtype=info.dtype,
            layout=info.layout,
            file=FileTensor(name=names[place], index=place, shape=tuple(shape), dtype="float32"),
        )
        for info, shape, place in zip(tensors, shapes, places, strict=True)
    )
