"""Stores the streamlined integer graph in a bundle: ``graph.json`` and ``constants.npz``, for devices without onnx.

``graph.json`` holds the graph's nodes in execution order, the shape and FINN datatype of every tensor (for a batch of
one), and how each constant is coded; ``constants.npz`` holds the constants' bytes (``0``, ``1``, … in the order of
``graph.json``), and its digest stands in ``graph.json``. Equal graphs give equal bytes. Writing needs onnx, reading
only numpy.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge_protocol import codec, digest
from kedge_protocol.errors import KedgeError, ModelError, StorageError, VerificationError
from kedge_protocol.npz import UNREADABLE
from kedge_targets.backends.finn import bit_packing

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]

VERSION = 1
GRAPH = "graph.json"
CONSTANTS = "constants.npz"
FLOAT = "FLOAT32"

_DTYPES = ("float32", "float64", "int32", "int64")
_REMEDY = "Compile the model again"


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """An activation: its shape with a batch of one, and its FINN datatype (``INT4``, ``BIPOLAR``, ``FLOAT32``, …)."""

    shape: tuple[int, ...]
    datatype: str = FLOAT


@dataclass(frozen=True, kw_only=True)
class Node:
    """One operation.

    Attributes:
        operator: operator of ONNX or QONNX (``MultiThreshold``, ``Im2Col``, …).
        inputs, outputs: names of tensors and constants; an omitted input is empty.
        attributes: numbers, strings, and lists of them.
        fabric: whether it is part of the accelerator; the rest runs on the processor around it.
    """

    name: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    fabric: bool = False


@dataclass(frozen=True)
class Graph:
    """A graph with its constants' values; ``inputs`` and ``outputs`` are names in ``tensors``."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tensors: dict[str, Tensor]
    nodes: tuple[Node, ...]
    constants: dict[str, Array]


@dataclass(frozen=True, kw_only=True)
class _Constant:
    """How a constant is stored: coded, or as an array of ``dtype``."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    code: bit_packing.Code | None = None


@dataclass(frozen=True, kw_only=True)
class _Document:
    """The content of ``graph.json``."""

    version: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tensors: dict[str, Tensor]
    nodes: tuple[Node, ...]
    constants: tuple[_Constant, ...]
    digest: str


@dataclass(frozen=True)
class _Version:
    """The only part of a document that is read before its version is known."""

    version: int


def written(
    streamlined: onnx.ModelProto,
    folder: Path,
    *,
    before: Sequence[str] | None = None,
    behind: Sequence[str] = (),
) -> dict[str, Path]:
    """Write a streamlined graph for the simulator.

    Args:
        streamlined: FINN-ONNX after streamlining, with shapes inferred for a batch of one and ``finn_datatype``
            annotations.
        folder: folder for the files; created if missing.
        before, behind: operators of the nodes outside the one dataflow partition, in order (``["Transpose"]``,
            ``["TopK"]``); all other nodes are the accelerator. None for ``before`` means that no partition is known.

    Returns:
        Title → path: :data:`GRAPH`, which the runtime opens, and :data:`CONSTANTS`.

    Raises:
        ModelError: a tensor has no shape, the batch is not one, an attribute cannot be stored, or the given nodes
            outside the partition are not in the graph there.
        StorageError: the disk is full or not writable.
    """
    return save(of_onnx(streamlined, before=before, behind=behind), folder)


def save(graph: Graph, folder: Path) -> dict[str, Path]:
    """Write a graph; see :func:`written`."""
    constants, members = [], []
    for name, value in graph.constants.items():
        code = bit_packing.code_for(value)
        constants.append(_Constant(name=name, shape=value.shape, dtype=value.dtype.name, code=code))
        members.append(np.asarray(value, order="C") if code is None else bit_packing.pack(value, code))
    raw = _npz(members)
    document = _Document(
        version=VERSION,
        inputs=graph.inputs,
        outputs=graph.outputs,
        tensors=graph.tensors,
        nodes=graph.nodes,
        constants=tuple(constants),
        digest=digest.of_bytes(raw),
    )
    files = {GRAPH: folder / GRAPH, CONSTANTS: folder / CONSTANTS}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files[CONSTANTS].write_bytes(raw)
        files[GRAPH].write_bytes(codec.encode(document))
    except OSError as error:
        raise StorageError(f"cannot be written: {error.strerror}", where=str(folder)) from error
    return files


def read(path: Path) -> Graph:
    """Read a graph; ``constants.npz`` lies beside it.

    Raises:
        VerificationError: the file is not such a graph, has another version, or is damaged.
    """
    where = path.name
    try:
        raw = path.read_bytes()
        version = codec.decode(raw, _Version, where=where).version
        if version != VERSION:
            raise VerificationError(
                f"is of version {version}, this agent reads version {VERSION}",
                where=where,
                remedy="Update the agent or compile the model again",
            )
        document = codec.decode(raw, _Document, where=where)
        constants = (path.parent / CONSTANTS).read_bytes()
    except OSError as error:
        raise VerificationError(f"cannot be read: {error.strerror}", where=error.filename, remedy=_REMEDY) from error
    except VerificationError:
        raise
    except KedgeError as error:
        raise VerificationError(error.what, where=where, remedy=_REMEDY) from error
    if digest.of_bytes(constants) != document.digest:
        raise VerificationError(f"is not the one that {where} belongs to", where=CONSTANTS, remedy=_REMEDY)
    graph = Graph(
        document.inputs,
        document.outputs,
        document.tensors,
        document.nodes,
        _constants(constants, document.constants),
    )
    _check(graph, where)
    return graph


def _constants(raw: bytes, listed: Sequence[_Constant]) -> dict[str, Array]:
    found: dict[str, Array] = {}
    try:
        with np.lib.npyio.NpzFile(io.BytesIO(raw), allow_pickle=False) as archive:
            for index, constant in enumerate(listed):
                value = archive[str(index)]
                if constant.dtype not in _DTYPES or any(size < 0 for size in constant.shape):
                    raise ValueError(f"{constant.name!r} has dtype {constant.dtype} and shape {constant.shape}")
                dtype, code = np.dtype(constant.dtype), constant.code
                if code is not None:
                    size = bit_packing.packed_size(int(np.prod(constant.shape, dtype=np.int64)), code)
                    if value.dtype != np.uint8 or value.shape != (size,) or code.bits not in bit_packing.WIDTHS:
                        raise ValueError(f"{constant.name!r} has {value.size} bytes instead of {size}")
                    value = bit_packing.unpack(value, code, constant.shape, dtype)
                elif value.dtype != dtype or value.shape != constant.shape:
                    raise ValueError(f"{constant.name!r} is not as it is described")
                found[constant.name] = value
    except UNREADABLE as error:
        raise VerificationError(f"cannot be read: {error}", where=CONSTANTS, remedy=_REMEDY) from error
    return found


def _check(graph: Graph, where: str) -> None:
    """Raise :class:`VerificationError` unless every node's inputs exist and nothing is produced twice."""
    made = set(graph.inputs) | set(graph.constants)
    for node in graph.nodes:
        if absent := [name for name in node.inputs if name and name not in made]:
            raise VerificationError(
                f"{node.operator} reads {absent[0]!r}, which nothing makes", where=f"{where}, node {node.name!r}"
            )
        for name in node.outputs:
            if name in made or name not in graph.tensors:
                raise VerificationError(
                    f"{name!r} is made twice or has no shape", where=f"{where}, node {node.name!r}", remedy=_REMEDY
                )
            made.add(name)
    if absent := [name for name in (*graph.inputs, *graph.outputs) if name not in graph.tensors or name not in made]:
        raise VerificationError(f"nothing makes {absent[0]!r}", where=where, remedy=_REMEDY)
    if broken := [name for name, tensor in graph.tensors.items() if tensor.shape[:1] != (1,)]:
        raise VerificationError(f"{broken[0]!r} has no batch of one", where=where, remedy=_REMEDY)


def _npz(arrays: Sequence[Array]) -> bytes:
    """Return the arrays as ``.npz`` bytes. Equal arrays give equal bytes: no times, no compression."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for index, value in enumerate(arrays):
            with archive.open(zipfile.ZipInfo(f"{index}.npy"), "w") as member:
                np.lib.format.write_array(member, np.asarray(value), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def of_onnx(streamlined: onnx.ModelProto, *, before: Sequence[str] | None = None, behind: Sequence[str] = ()) -> Graph:
    """Convert a streamlined graph to this module's form; see :func:`written`."""
    from onnx import helper, numpy_helper

    graph = streamlined.graph
    constants = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = _constant(node)
    shapes = {
        info.name: tuple(size.dim_value for size in info.type.tensor_type.shape.dim)
        for info in (*graph.input, *graph.output, *graph.value_info)
    }
    datatypes = {
        annotation.tensor_name: entry.value
        for annotation in graph.quantization_annotation
        for entry in annotation.quant_parameter_tensor_names
        if entry.key == "finn_datatype"
    }
    nodes = [node for node in graph.node if node.op_type != "Constant"]
    inputs = tuple(info.name for info in graph.input if info.name not in constants)
    tensors: dict[str, Tensor] = {}
    for name in (*inputs, *(name for node in nodes for name in node.output if name)):
        shape = shapes.get(name)
        if not shape or 0 in shape:
            raise ModelError("its shape is not known", where=f"tensor {name!r}", remedy="Infer shapes first")
        if shape[0] != 1:
            raise ModelError(
                f"its first axis is {shape[0]}, a batch of one was expected",
                where=f"tensor {name!r}",
                remedy="Export the model so that the first axis of every activation is the batch",
            )
        tensors[name] = Tensor(shape=shape, datatype=datatypes.get(name, FLOAT))
    used = {name for node in nodes for name in node.input}
    made = [
        Node(
            name=node.name or f"{node.op_type}_{index}",
            operator=node.op_type,
            inputs=tuple(node.input),
            outputs=tuple(name for name in node.output if name),
            attributes={a.name: _attribute(helper.get_attribute_value(a), node, a.name) for a in node.attribute},
        )
        for index, node in enumerate(nodes)
    ]
    made = _transposed_first(made, tensors)
    return Graph(
        inputs,
        tuple(info.name for info in graph.output),
        tensors,
        tuple(made if before is None else _with_fabric(made, before, behind)),
        {name: _kept(constants[name], name) for name in sorted(constants) if name in used},
    )


def _constant(node: onnx.NodeProto) -> Array:
    from onnx import helper, numpy_helper

    attribute = node.attribute[0]
    value = helper.get_attribute_value(attribute)
    if attribute.name == "value":
        return np.asarray(numpy_helper.to_array(value))
    return np.asarray(value, dtype=np.int64 if attribute.name.startswith("value_int") else np.float32)


def _kept(value: Array, name: str) -> Array:
    kinds = {"f": np.float64 if value.dtype.itemsize > 4 else np.float32, "i": np.int64, "u": np.int64, "b": np.int64}
    kind = kinds.get(value.dtype.kind)
    if kind is None:
        raise ModelError(f"dtype {value.dtype} cannot be kept", where=f"constant {name!r}")
    return value.astype(kind)


def _attribute(value: Any, node: onnx.NodeProto, name: str) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, (int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_attribute(item, node, name) for item in value]
    raise ModelError(
        f"its attribute {name!r} is a {type(value).__name__}, which a streamlined graph has nowhere",
        where=f"{node.op_type} {node.name!r}",
    )


def _transposed_first(nodes: list[Node], tensors: dict[str, Tensor]) -> list[Node]:
    """Move thresholds behind a transposition that follows them, as in hardware layers, whose channels are always last.
    The tensor between the two is added to ``tensors``."""
    nodes = list(nodes)
    index = 0
    while index + 1 < len(nodes):
        first, second = nodes[index], nodes[index + 1]
        between = first.outputs[:1]
        readers = [node for node in nodes if between[0] in node.inputs]
        order = second.attributes.get("perm")
        layout = first.attributes.get("data_layout") or ""
        if (
            first.operator == "MultiThreshold"
            and second.operator == "Transpose"
            and second.inputs == between
            and readers == [second]
            and order is not None
            and len(layout) == len(order)
        ):
            name = f"{between[0]}_transposed"
            source = tensors[first.inputs[0]]
            tensors[name] = Tensor(shape=tuple(source.shape[axis] for axis in order), datatype=source.datatype)
            del tensors[between[0]]
            attributes = {**first.attributes, "data_layout": "".join(layout[axis] for axis in order)}
            nodes[index] = replace(second, inputs=first.inputs[:1], outputs=(name,))
            nodes[index + 1] = replace(
                first, inputs=(name, *first.inputs[1:]), outputs=second.outputs, attributes=attributes
            )
            # What stands before it may be thresholds too.
            index = max(0, index - 1)
        else:
            index += 1
    return nodes


def _with_fabric(nodes: list[Node], before: Sequence[str], behind: Sequence[str]) -> list[Node]:
    """Return all nodes, marked as part of the accelerator except the first and last ones that are outside.

    Raises:
        ModelError: the first or last nodes are different ones.
    """
    inside = slice(len(before), len(nodes) - len(behind))
    found = [node.operator for node in nodes]
    for place, wanted, there in (
        ("begin", list(before), found[: len(before)]),
        ("end", list(behind), found[len(nodes) - len(behind) :]),
    ):
        if wanted != there:
            raise ModelError(
                f"the partition leaves out {', '.join(wanted)}, the streamlined graph {place}s with {', '.join(there)}",
                remedy="Give the graph and the partition of one and the same run of the toolchain",
            )
    return [*nodes[: inside.start], *(replace(node, fabric=True) for node in nodes[inside]), *nodes[inside.stop :]]
