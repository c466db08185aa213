"""Writes a graph piece by piece: large constants go directly to a file beside it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from kedge_targets.decoder.matrix import Codes, Matrix, packed

Array = npt.NDArray[Any]

MICROSOFT = "com.microsoft"
OPSET = 21
_EXTERNAL = 1024
"""Bytes from which a constant is stored in the file beside the graph."""
_ALIGN = 4096
ACCURACY = 4
"""Accuracy level of MatMulNBits: activations in int8. Measured on AVX2: 2.6 times the tokens per second of float
activations. CUDA's kernels know no levels: in float16 activations stay as they are."""


class Constants:
    """A file of large constants; a context manager.

    Args:
        path: None to keep constants in the graphs.
        shared: whether several graphs use it, which then share equal constants.
    """

    def __init__(self, path: Path | None, *, shared: bool = False) -> None:
        self._path = path
        self._shared = shared
        self._file: BinaryIO | None = None
        self._offsets: dict[bytes, int] = {}

    def __enter__(self) -> Constants:
        if self._path is not None:
            self._file = self._path.open("wb")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def place(self, array: Array) -> dict[str, Any] | None:
        """Store an array and return its location, offset and length; None if it belongs into the graph."""
        if self._file is None or self._path is None or array.nbytes < _EXTERNAL:
            return None
        raw = array.tobytes()
        digest = hashlib.sha256(raw).digest() if self._shared else b""
        offset = self._offsets.get(digest)
        if offset is None:
            self._file.write(b"\0" * (-self._file.tell() % _ALIGN))
            offset = self._file.tell()
            self._file.write(raw)
        if self._shared:
            self._offsets[digest] = offset
        return {"location": self._path.name, "offset": offset, "length": len(raw)}


class GraphWriter:
    """A writer of a graph; a context manager that owns the constants' file.

    Args:
        data: path of the file for large constants, or a file that is open already; None to keep them in the graph.
        half: whether the graph computes in float16; else in float32.

    Attributes:
        real: the type of the numbers that it computes with, as ONNX names it.
    """

    def __init__(self, data: Path | Constants | None = None, *, half: bool = False) -> None:
        self.real = onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT
        self._dtype = np.dtype(np.float16 if half else np.float32)
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self._constants: list[onnx.TensorProto] = []
        self._stored = data if isinstance(data, Constants) else Constants(data)
        self._own = not isinstance(data, Constants)
        self._names = 0

    def __enter__(self) -> GraphWriter:
        if self._own:
            self._stored.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._own:
            self._stored.__exit__(kind, error, at)

    def name(self, stem: str) -> str:
        """Return an unused name."""
        self._names += 1
        return f"{stem}.{self._names}"

    def constant(self, array: Array, stem: str = "constant") -> str:
        """Store a constant and return its name."""
        array = np.ascontiguousarray(array)
        name = self.name(stem)
        place = self._stored.place(array)
        if place is None:
            self._constants.append(numpy_helper.from_array(array, name))
            return name
        tensor = onnx.TensorProto(name=name, dims=array.shape, data_location=onnx.TensorProto.EXTERNAL)
        tensor.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        self._constants.append(tensor)
        return name

    def op(
        self, kind: str, inputs: list[str], outputs: list[str] | None = None, *, domain: str = "", **attributes: Any
    ) -> str:
        """Add a node and return the name of its first output."""
        named = outputs or [self.name(kind)]
        self.nodes.append(helper.make_node(kind, inputs, named, self.name(f"node.{kind}"), domain=domain, **attributes))
        return named[0]

    def take(self, name: str, kind: int, shape: list[Any]) -> None:
        """Add an input of the graph."""
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))

    def give(self, name: str, kind: int, shape: list[Any]) -> None:
        """Add an output of the graph."""
        self.outputs.append(helper.make_tensor_value_info(name, kind, shape))

    def product(self, value: str, matrix: Matrix, stem: str, bias: Array | None = None, output: str = "") -> str:
        """Add ``value @ matrix.T + bias`` and return its name."""
        named = [output] if output and bias is None else None
        if isinstance(matrix, Codes):
            codes, scales, zeros = self.codes(matrix, stem)
            found = self._nbits(value, matrix, codes, scales, zeros, named)
        else:
            found = self.op("MatMul", [value, self.weights(np.ascontiguousarray(matrix.T), stem)], named)
        if bias is None:
            return found
        added = [output] if output else None
        return self.op("Add", [found, self.numbers(bias, f"{stem}.bias")], added)

    def numbers(self, array: Array, stem: str = "constant") -> str:
        """Store a constant in the type that the graph computes with, and return its name."""
        return self.constant(array.astype(self._dtype), stem)

    def weights(self, array: Array, stem: str) -> str:
        """Store a matrix, float16 or float32, as it is; where the graph computes in another type, ONNX Runtime converts
        it once at loading."""
        return self.computed(self.constant(array, stem), array)

    def computed(self, name: str, array: Array) -> str:
        """Return a value of an array's type, in the type that the graph computes with."""
        return name if array.dtype == self._dtype else self.op("Cast", [name], to=self.real)

    def codes(self, matrix: Codes, stem: str) -> tuple[str, str, str]:
        """Store codes [out, groups, bytes], scales and zero-points in MatMulNBits's layout, and return their names."""
        codes, scales, *zeros = stored_codes(matrix)
        named = self.constant(zeros[0], f"{stem}.zeros") if zeros else ""
        return self.constant(codes, f"{stem}.codes"), self.numbers(scales, f"{stem}.scales"), named

    def _nbits(self, value: str, matrix: Codes, codes: str, scales: str, zeros: str, outputs: list[str] | None) -> str:
        inputs = [value, codes, scales, *([zeros] if zeros else [])]
        return self.op(
            "MatMulNBits",
            inputs,
            outputs,
            domain=MICROSOFT,
            K=matrix.shape[1],
            N=matrix.shape[0],
            bits=matrix.bits,
            block_size=matrix.group,
            accuracy_level=ACCURACY if self.real == onnx.TensorProto.FLOAT else 0,
        )

    def shared_product(self, value: str, matrix: Codes, names: tuple[str, str, str], output: str) -> str:
        """Add :meth:`product` with codes that are already stored."""
        return self._nbits(value, matrix, *names, [output])

    def model(self) -> onnx.ModelProto:
        """Return the finished model."""
        graph = helper.make_graph(self.nodes, "decoder", self.inputs, self.outputs, self._constants)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="kedge")


def stored_codes(matrix: Codes) -> list[Array]:
    """Return codes [out, groups, bytes], scales and, if there are any, zero-points in MatMulNBits's layout."""
    rows, columns = matrix.shape
    groups = -(-columns // matrix.group)
    padded = np.pad(matrix.codes, ((0, 0), (0, groups * matrix.group - columns)))
    blob = packed(padded.reshape(rows, groups, matrix.group), matrix.bits)
    zeros = [] if matrix.zeros is None else [packed(matrix.zeros, matrix.bits)]
    return [blob, matrix.scales, *zeros]
