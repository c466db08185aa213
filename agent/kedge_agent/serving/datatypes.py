"""Maps the datatypes of the Open Inference Protocol to numpy's."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol import tensors
from kedge_protocol.bundle.config import TEXT, TensorSpec
from kedge_protocol.errors import InputError

Array = npt.NDArray[Any]

DATATYPES = {
    "BOOL": "bool",
    "UINT8": "uint8",
    "UINT16": "uint16",
    "UINT32": "uint32",
    "UINT64": "uint64",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
    "BF16": "float32",
    "BYTES": "object",
}
"""Datatype of the protocol → numpy dtype. numpy has no BF16; float32 holds all its values."""
_NAMES = {dtype: name for name, dtype in DATATYPES.items() if name != "BF16"}
_NAMES_OF_DTYPES = {np.dtype(dtype): name for dtype, name in _NAMES.items()}
_NAMES[TEXT] = "BYTES"
MAX_RANK = 16


def name_of(dtype: str) -> str:
    """Return the protocol's name of a numpy dtype."""
    return _NAMES.get(dtype, dtype.upper())


def datatype_of(array: Array) -> str:
    """Return the protocol's name of an array's dtype; ``BYTES`` for objects."""
    # numpy computes the name of a dtype anew each time, for 15 µs.
    return _NAMES_OF_DTYPES.get(array.dtype) or name_of(array.dtype.name)


def described(spec: TensorSpec) -> dict[str, Any]:
    """Return the metadata of an input or output; free axes are -1."""
    shape = [-1 if axis is None else axis for axis in spec.shape]
    return {"name": spec.name, "datatype": name_of(spec.dtype), "shape": shape}


def checked_datatype(datatype: object, *, where: str) -> str:
    """Return the datatype if it is known.

    Raises:
        InputError: the datatype is unknown.
    """
    if not isinstance(datatype, str) or datatype not in DATATYPES:
        raise InputError(f"datatype {str(datatype)[:40]!r} is not known; known are {', '.join(DATATYPES)}", where=where)
    return datatype


def checked_shape(shape: object, *, where: str) -> list[int]:
    """Return the shape if it consists of non-negative integers.

    Raises:
        InputError: it is not a list of non-negative integers, has too many axes, or is of no tensor that fits into
            memory.
    """
    if isinstance(shape, list) and len(shape) <= MAX_RANK and all(type(axis) is int and axis >= 0 for axis in shape):
        # With an axis of 0 no data are needed, however long the others are; numpy refuses those that it cannot count.
        if 0 in shape and math.prod(axis or 1 for axis in shape) > sys.maxsize // 16:
            raise InputError(f"no tensor has the shape {shape}", where=where)
        return shape
    raise InputError("'shape' is not a list of whole numbers", where=where)


def converted(array: Array, wanted: np.dtype[Any], *, where: str) -> Array:
    """Return a request's tensor of another datatype in the input's.

    Any number may be sent for a float input and is rounded to its type; for an integer or boolean input, only integers
    in its range.

    Raises:
        InputError: a number that the input's datatype cannot hold, text for an input of numbers, or the reverse.
    """
    name = name_of(wanted.name)
    if wanted.kind == "U":
        if array.dtype.kind != "O":
            raise InputError("the model takes text (BYTES), not numbers", where=where)
        return tensors.texts(array, where=where)
    if array.dtype.kind not in "fiub":
        raise InputError(f"the model takes {name}, not text", where=where)
    if wanted.kind == "f":
        with np.errstate(over="ignore"):
            made = array.astype(wanted)
        if array.dtype.kind != "f" or array.dtype.itemsize > wanted.itemsize:
            overflown = np.isinf(made) if array.dtype.kind != "f" else np.isinf(made) & ~np.isinf(array)
            if overflown.any():
                raise InputError(f"a number is out of the range of {name}, which the model takes", where=where)
        return made
    with np.errstate(invalid="ignore", over="ignore"):
        made = array.astype(wanted)
        back = made.astype(array.dtype)
    if not np.array_equal(back, array) or ((made < 0) != (array < 0)).any():
        raise InputError(f"a number is not one of {name}, which the model takes", where=where)
    return made
