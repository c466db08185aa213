"""Makes the model's float ``.tflite``, from which all its other files are made, and compares it with the ONNX graph."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from kedge_protocol.errors import InputError, LoweringError, UnsupportedOperatorError
from kedge_targets.backends.tflite import axis_matching, graph_preparation, toolchain_client
from kedge_targets.backends.tflite.runtime import BUILTIN, Runtime
from kedge_targets.backends.tflite.toolchain_client import Converted, ConvertRequest
from kedge_targets.contract import Calibration
from kedge_targets.graph import (
    attention,
    batch,
    library,
    model_writer,
    node_tracing,
    qdq_placement,
    ranges,
    signature,
)
from kedge_targets.graph.wiring import Wiring
from kedge_targets.numerics import Precision

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]
_Refusal: TypeAlias = LoweringError | UnsupportedOperatorError

_REAL_PROBES = 2
_ELSEWHERE = "Choose a target with another backend for this model"
_SMALL = 1e-3  # what lies in 0..1 is compared as if it were no smaller than this
_AGREES = 0.01  # relative error of the float file against the ONNX graph; a wrong order of axes is far beyond
_SCORED = 32  # samples whose scores of attention are looked at
_BOUNDED = frozenset({"Sigmoid", "Softmax", "HardSigmoid"})


@dataclass(frozen=True)
class FloatFile:
    """The float file, and how its axes map to the model's.

    Attributes:
        graph: the ONNX file given to the converter.
        prepared: the same graph before its names were simplified.
        names: node of ``graph`` → node of ``prepared``, if they differ.
        keep: inputs whose axes the converter left alone.
        plain: whether Kedge's own converter made it.
        file: the ``.tflite``.
        made: what the file contains.
        match: the mapping of axes.
        turned: inputs whose axes :attr:`graph` has in another order than the model:
            ``graph = model.transpose(permutation)``.
        batch: number of samples in one call.
    """

    graph: Path
    prepared: onnx.ModelProto
    names: dict[str, str]
    keep: list[str]
    plain: bool
    file: Path
    made: Converted
    match: axis_matching.Match
    turned: dict[str, graph_preparation.Permutation]
    batch: int

    @property
    def orders(self) -> list[list[int]]:
        """The permutation of each input of :attr:`graph` for the file."""
        found = []
        for info, order in zip(signature.inputs(self.prepared), self.match.inputs, strict=True):
            turned = self.turned.get(info.name, tuple(range(len(order))))
            found.append([turned.index(axis) for axis in order])
        return found

    def nodes_of(self, layers: Sequence[str], given: onnx.ModelProto) -> list[str]:
        """Return the nodes of :attr:`graph` that do the work of these nodes of the model."""
        plain = {old: new for new, old in self.names.items()}
        return [plain.get(name, name) for name in node_tracing.trace_nodes(layers, given, self.prepared)]

    def layers_of(self, nodes: Sequence[str], given: onnx.ModelProto) -> tuple[str, ...]:
        """Return the nodes of the model from which these nodes of :attr:`graph` come, as far as names tell."""
        wanted = {self.names.get(name, name) for name in nodes}
        return tuple(node.name for node in given.graph.node if node.name in wanted)


@dataclass(frozen=True)
class _Attempt:
    """A form of the graph, the inputs whose axes must stay, and whether onnx2tf is skipped."""

    graph: Path
    prepared: onnx.ModelProto
    names: dict[str, str]
    turned: dict[str, graph_preparation.Permutation]
    keep: list[str]
    plain: bool = False


def make_float_model(model: onnx.ModelProto, calibration: Calibration, workdir: Path) -> FloatFile:
    """Make the float file and determine its axes.

    onnx2tf infers the order of axes from their sizes, and may be wrong if sizes repeat. Its result is compared with the
    ONNX graph; if they differ, or if it fails, Kedge's own converter is tried, which knows every axis but fewer
    operators; then onnx2tf again with the graph in another form: not folded, with norms written out, with all its
    inputs left as they are, with none.

    Raises:
        UnsupportedOperatorError: an operator is not supported; names it and its node.
        LoweringError: no form can be converted, or none gives the graph's results.
    """
    probes, floors = _probes(model, calibration), _floors(model, calibration)
    errors: list[_Refusal] = []
    for attempt in _attempts(model, workdir, _mask(model, calibration)):
        try:
            return _matched(model, attempt, workdir / "float32.tflite", probes, floors)
        except (UnsupportedOperatorError, LoweringError) as error:
            errors.append(_with_own_name(error, attempt))
    named = (error for error in errors if error.where)
    raise next(named, errors[0] if errors else LoweringError("there is no way to convert the graph"))


def _with_own_name(error: _Refusal, attempt: _Attempt) -> _Refusal:
    """Return the error with the node's name in the model."""
    place = error.where or ""
    for plain, own in attempt.names.items():
        place = place.replace(repr(plain), repr(own))
    return type(error)(error.what, where=place or None, remedy=error.remedy)


def _mask(model: onnx.ModelProto, calibration: Calibration) -> float:
    """Return what takes the place of minus infinity in masks of attention: far below the scores of some samples."""
    tensors = [node.input[0] for node in model.graph.node if node.op_type == "Softmax"]
    if not attention.masks(model):
        return attention.ENOUGH
    seen = ranges.observe(model, itertools.islice(calibration, _SCORED), list(dict.fromkeys(tensors)))
    least = min(low for low, _ in seen.values())
    return attention.ENOUGH if least > attention.ENOUGH / 2 else 2 * least + attention.ENOUGH


def _attempts(model: onnx.ModelProto, workdir: Path, mask: float = attention.ENOUGH) -> Iterator[_Attempt]:
    """Yield the attempts, the most promising first."""
    folded = _attempt(graph_preparation.prepare(model, mask=mask), workdir / "folded.onnx")
    yield folded
    yield dataclasses.replace(folded, plain=True)
    yield _attempt(graph_preparation.prepare(model, fold=False, mask=mask), workdir / "plain.onnx")
    if any(node.op_type == "LayerNormalization" for node in folded.prepared.graph.node):
        yield _attempt(graph_preparation.prepare(model, plain_norms=True, mask=mask), workdir / "norms.onnx")
    every = [info.name for info in signature.inputs(folded.prepared)]
    plain = {old: new for new, old in folded.names.items()}
    for other in ([plain.get(name, name) for name in every], []):
        if other != folded.keep:
            yield dataclasses.replace(folded, keep=other)


def _attempt(made: tuple[onnx.ModelProto, dict[str, graph_preparation.Permutation]], path: Path) -> _Attempt:
    prepared, turned = made
    plain, names = graph_preparation.with_plain_names(prepared)
    model_writer.save(plain, path)
    return _Attempt(path, prepared, names, turned, graph_preparation.kept_inputs(plain))


def _matched(
    model: onnx.ModelProto,
    attempt: _Attempt,
    file: Path,
    probes: list[axis_matching.Probe],
    floors: list[float],
) -> FloatFile:
    request = ConvertRequest(
        graph=str(attempt.graph),
        keep=attempt.keep,
        plain=attempt.plain,
        precision=Precision.FLOAT32.value,
        file=str(file),
    )
    found = toolchain_client.convert(request)
    session = Runtime().load(file, {}, kernel_set=BUILTIN)
    try:
        shapes = [tensor.shape for tensor in found.inputs]
        match = axis_matching.match(session, shapes, found.input_order, probes, floors=floors)
    except InputError as error:  # indices made for the other order of axes, for one
        raise LoweringError(f"the converted float model does not run: {error.what}", remedy=_ELSEWHERE) from error
    finally:
        session.close()
    names = [info.name for info in signature.outputs(model)]
    if match is None or match.off > _AGREES:
        how = (
            "no order of its axes fits the shapes"
            if match is None
            else f"output {names[match.worst]!r} is {match.off:.2g} of its size off, in the best order of axes"
        )
        raise LoweringError(
            f"the converted float model does not compute what the ONNX graph computes: {how}",
            remedy=_ELSEWHERE,
        )
    size = int(probes[0].inputs[0].shape[0]) if probes[0].inputs else 1
    return FloatFile(
        graph=attempt.graph,
        prepared=attempt.prepared,
        names=attempt.names,
        keep=attempt.keep,
        plain=attempt.plain,
        file=file,
        made=found,
        match=match,
        turned=attempt.turned,
        batch=size,
    )


def _floors(model: onnx.ModelProto, calibration: Calibration) -> list[float]:
    """Return for each output what it is compared with at least: a thousandth where it lies in 0..1 by construction,
    since 1e-9 instead of 2e-9 is no error then, and else what keeps the error above the resolution of the numbers that
    it is computed of: a SiLU of -20 is -4e-8, and 20 has steps of 2e-6."""
    wiring = Wiring(model)
    makers = [wiring.maker.get(wiring.source(info.name)) for info in signature.outputs(model)]
    known = qdq_placement.floats(model)
    given = [
        [name for name in maker.input if name in known and wiring.constant(name) is None] if maker is not None else []
        for maker in makers
    ]
    tensors = list(dict.fromkeys(name for names in given for name in names))
    entries = signature.inputs(model)
    few = (
        {info.name: np.asarray(sample[info.name], dtype=info.dtype) for info in entries}
        for sample in itertools.islice(calibration, _REAL_PROBES)
    )
    seen = ranges.observe(model, few, tensors) if tensors and calibration.samples else {}
    floors = []
    for maker, names in zip(makers, given, strict=True):
        largest = max((max(-seen[name][0], seen[name][1]) for name in names if name in seen), default=0.0)
        bounded = maker is not None and maker.op_type in _BOUNDED
        floors.append(max(_SMALL if bounded else 0.0, float(np.finfo(np.float32).eps) * largest / _AGREES))
    return floors


def _probes(model: onnx.ModelProto, calibration: Calibration) -> list[axis_matching.Probe]:
    """Return runs of the ONNX graph itself, on real samples and on noise like them."""
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
    for sample in batch.regroup(iter(calibration), batch.size(model)):
        samples.append({info.name: np.asarray(sample[info.name], dtype=info.dtype) for info in given})
        if len(samples) == _REAL_PROBES:
            break
    if not samples:
        samples = [axis_matching.made_up(given)]
    probes = []
    for sample in [*samples, axis_matching.noise_like(samples[0], seed=0)]:
        outputs = reference.run(names, sample)
        if all(np.isfinite(output).all() for output in outputs if output.dtype.kind == "f"):
            probes.append(axis_matching.Probe([sample[info.name] for info in given], outputs))
    if not probes:
        raise LoweringError("the model answers NaN or infinity to its own calibration samples")
    return probes
