"""The user's model: read and checked in the worker, never changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kedge_protocol import digest
from kedge_protocol.bundle.config import TEXT
from kedge_protocol.errors import ModelError
from kedge_targets.graph.signature import TensorInfo
from kedge_targets.worker import Progress

if TYPE_CHECKING:
    import onnx

_BATCH_BYTES = 256 << 20
"""Activations of one batch, at most."""
_MAX_BATCH = 64
_METADATA = 1 << 16
"""Characters; longer values are nothing that is read here."""


@dataclass(frozen=True, kw_only=True)
class PrepareRequest:
    """Read and check ``model``; write the graph that backends take to ``graph``, and into the folder ``scratch`` what
    else is made of it.

    Attributes:
        digest, size_bytes: of the user's file, where ``model`` was made from another kind of file.
        batch_axes, states: that the user declares, see :mod:`kedge_targets.graph.batch_axes`.
    """

    model: str
    graph: str
    digest: str | None = None
    size_bytes: int | None = None
    batch_axes: dict[str, int] = field(default_factory=dict)
    states: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A model that another is distilled from; ``file`` without its folder."""

    file: str
    digest: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Model:
    """What a model is.

    Attributes:
        graph: a copy of the file, checked, with shapes inferred, its external data within, and the batch as the first
            axis of every input and output (:func:`kedge_targets.graph.batch_axes.batch_first`).
        digest: of the user's file (and, where there are, its external data files).
        size_bytes: of the same.
        activation_bytes: of all tensors between the nodes, for one sample; free axes count as one.
        inputs, outputs: of ``graph``; ``batch_axis`` is the user's own.
        classes: names of the classes that the graph holds, in the order of its scores.
        states: inputs that take what an output gave in the call before, by name.
        fixed_batch: whether the graph takes one sample at a time only.
        reference: the graph that judges: one that ONNX Runtime runs and that computes the same (another file than
            ``graph`` only where that has QONNX's nodes), or the teacher's.
        teacher: what ``reference`` is, where it is another model.
        metadata: what the file says of itself by key.
        quantized: whether it has.
        attention: names of the products of two activations in attention, in the graph's order.
        takes_missing: whether NaN as an input is a missing value: it has an imputer, trees, or asks for NaN itself.
        ends: sets of nodes at both ends of the graph, from small to large: :func:`kedge_targets.graph.ends.ends`.
    """

    graph: str
    digest: str
    size_bytes: int
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    activation_bytes: int
    fixed_batch: bool
    reference: str
    teacher: Teacher | None = None
    states: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    quantized: bool = False
    attention: tuple[str, ...] = ()
    takes_missing: bool = False
    ends: tuple[tuple[str, ...], ...] = ()

    @property
    def float_bytes(self) -> int:
        """Return the size of the model that judges, which a bundle's size is compared with."""
        return self.size_bytes if self.teacher is None else self.teacher.size_bytes

    @property
    def batch(self) -> int:
        """How many samples to hand over at once; a lowered file with a fixed batch takes them in pieces."""
        if any(not info.batched for info in (*self.inputs, *self.outputs)):
            return 1
        return max(1, min(_MAX_BATCH, _BATCH_BYTES // max(1, self.activation_bytes)))


def prepare(request: PrepareRequest, progress: Progress) -> Model:
    """A task of the worker.

    Raises:
        ConfigError: a declared axis or state that the model does not have.
        ModelError: no ONNX file, too new, broken, no tensors in and out, or a fixed batch of more than one.
        UnsupportedOperatorError: an operator of no known opset.
        StorageError: no space for the copy.
    """
    from kedge_targets.graph import (
        attention,
        batch,
        batch_axes,
        classifier_outputs,
        ends,
        model_reader,
        model_writer,
        nodes,
        qonnx,
        signature,
        states,
    )

    path = Path(request.model)
    model = model_reader.read(path)
    metadata = {one.key: one.value for one in model.metadata_props if len(one.value) <= _METADATA}
    pairs = states.find(signature.inputs(model), signature.outputs(model), declared=request.states)
    axes = batch_axes.find(model, declared=request.batch_axes, states=pairs)
    model = batch_axes.batch_first(model, axes)
    inputs = [replace(info, batch_axis=axes.of(info.name)) for info in signature.inputs(model)]
    size = batch.size(model)
    if size not in (None, 1):
        raise _of_several(size, inputs[0].name, path)
    outputs = [replace(info, batch_axis=axes.of(info.name)) for info in signature.outputs(model)]
    _check_dtypes(inputs, outputs, path)
    files = [path, *_external(path)]
    model_writer.save(model, Path(request.graph))
    reference, quantized = request.graph, qonnx.is_quantized(model)
    if quantized:
        reference = str(Path(request.graph).with_name("reference.onnx"))
        model_writer.save(model_reader.infer_shapes(qonnx.expand_qonnx(model), where=str(path)), Path(reference))
    return Model(
        graph=request.graph,
        digest=request.digest or _digest(files),
        size_bytes=request.size_bytes or sum(file.stat().st_size for file in files),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        activation_bytes=_activations(model, outputs),
        fixed_batch=size == 1 or None in axes.inputs.values(),
        states=pairs,
        classes=classifier_outputs.class_names(model),
        reference=reference,
        metadata=metadata,
        quantized=quantized,
        attention=tuple(attention.products(model)),
        takes_missing=any(operator in _OF_MISSING for _, operator in nodes.operators(model)),
        ends=() if quantized else tuple(ends.ends(model)),
    )


def _of_several(size: int | None, name: str, path: Path) -> ModelError:
    return ModelError(
        f"its batch is fixed to {size}",
        where=str(path),
        remedy="Export the model with a free batch axis, or 1; if its first axis counts no samples, say "
        f"--batch-axis {name}=none",
    )


def _check_dtypes(inputs: Sequence[TensorInfo], outputs: Sequence[TensorInfo], path: Path) -> None:
    for info in (*inputs, *outputs):
        if info.dtype not in _DTYPES:
            raise ModelError(f"{info.name!r} has dtype {info.dtype}, which is not supported", where=str(path))
    if texts := [info.name for info in outputs if info.dtype == TEXT]:
        raise ModelError(
            f"output {texts[0]!r} gives texts, which nothing can be measured by",
            where=str(path),
            remedy="Export the class scores (probabilities) or the number of the class; names go by --labels",
        )


_OF_MISSING = frozenset({"Imputer", "TreeEnsembleClassifier", "TreeEnsembleRegressor", "TreeEnsemble", "IsNaN"})
_DTYPES = frozenset(
    {TEXT, "float16", "float32", "float64", "bool", *(f"{s}int{bits}" for s in ("", "u") for bits in (8, 16, 32, 64))}
)


def _digest(files: list[Path]) -> str:
    digests = [digest.of_file(file) for file in files]
    if len(digests) == 1:
        return digests[0]
    return digest.of_bytes("\n".join(digests).encode())


def _external(path: Path) -> list[Path]:
    """Files beside the model that hold its weights, sorted."""
    import onnx

    from kedge_targets.graph import nodes

    model = onnx.load_model(str(path), format="protobuf", load_external_data=False)
    names = {
        entry.value
        for graph in nodes.graphs(model.graph)
        for tensor in graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return [path.parent / name for name in sorted(names)]


def _activations(model: onnx.ModelProto, outputs: list[TensorInfo]) -> int:
    import onnx

    total = sum(8 * math.prod(axis or 1 for axis in info.shape) for info in outputs)
    for value in model.graph.value_info:
        tensor = value.type.tensor_type
        if not tensor.HasField("shape"):
            continue
        width = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize
        total += width * math.prod(dim.dim_value if dim.dim_value > 0 else 1 for dim in tensor.shape.dim)
    return total
