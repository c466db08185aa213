"""Tensors as bytes: the binary data extension of the Open Inference Protocol, and gRPC's raw contents.

Numbers are little-endian in row-major order; BOOL is one byte; each element of BYTES is preceded by its length, four
bytes little-endian.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import numpy as np

from kedge_agent.serving.datatypes import DATATYPES, Array
from kedge_protocol.errors import InputError

_LENGTH = struct.Struct("<I")
_STORED = {name: np.dtype(dtype).newbyteorder("<") for name, dtype in DATATYPES.items() if name != "BYTES"}
_STORED["BF16"] = np.dtype("<u2")


def array_of(data: memoryview, datatype: str, shape: Sequence[int], *, where: str) -> Array:
    """Return a tensor, without a copy if its datatype allows that.

    Args:
        data: the bytes of this tensor only.
        datatype: a known one.
        shape: non-negative integers.

    Raises:
        InputError: the bytes do not fill the shape, or are not elements of the datatype.
    """
    if datatype == "BYTES":
        return _texts(data, math.prod(shape), where=where).reshape(shape)
    stored = _STORED[datatype]
    needed = math.prod(shape) * stored.itemsize
    if needed != data.nbytes:
        raise InputError(f"{data.nbytes} bytes do not fill the shape {list(shape)} of {datatype}", where=where)
    if datatype == "BOOL":
        bits = np.frombuffer(data, np.uint8)
        if bits.size and bits.max() > 1:
            raise InputError("a BOOL is neither 0 nor 1", where=where)
        return bits.astype(bool).reshape(shape)
    array = np.frombuffer(data, stored).reshape(shape)
    if datatype == "BF16":
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if not array.flags.aligned:
        array = array.copy()
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def bytes_of(array: Array) -> memoryview | bytes:
    """Return a tensor's bytes, without a copy if they are contiguous; an object array is BYTES."""
    if array.dtype.kind == "O":
        texts = [text if isinstance(text, bytes) else str(text).encode() for text in array.reshape(-1)]
        return b"".join(_LENGTH.pack(len(text)) + text for text in texts)
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return memoryview(little.reshape(-1).view(np.uint8))  # type: ignore[arg-type]


def _texts(data: memoryview, count: int, *, where: str) -> Array:
    if count * _LENGTH.size > data.nbytes:
        raise InputError(f"{data.nbytes} bytes do not hold {count} texts", where=where)
    found = np.empty(count, dtype=object)
    at = 0
    for number in range(count):
        if at + _LENGTH.size > data.nbytes:
            raise InputError("the lengths of its texts lead beyond its bytes", where=where)
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        if at + length > data.nbytes:
            raise InputError("the lengths of its texts lead beyond its bytes", where=where)
        found[number] = bytes(data[at : at + length])
        at += length
    if at != data.nbytes:
        raise InputError("something follows its last text", where=where)
    return found
