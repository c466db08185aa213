"""Converts arrays to depthai's messages and back. Uses numpy and the standard library only; the library itself is
passed in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

DTYPES: dict[str, np.dtype[Any]] = {"FP16": np.dtype(np.float16), "U8F": np.dtype(np.uint8), "INT": np.dtype(np.int32)}
"""depthai's names for the types of a blob's inputs and outputs (``TensorInfo.DataType``)."""


def message(depthai: Any, tensors: list[tuple[str, Any, Array]]) -> Any:
    """Return one message with all inputs.

    Args:
        tensors: name, the blob's description (``TensorInfo``) and array of each input; an array has the input's shape
            and is converted to the dtype that the blob takes.
    """
    made = depthai.NNData()
    for name, info, array in tensors:
        numbers = np.asarray(array).astype(DTYPES[info.dataType.name], order="C", copy=False)
        made.addTensor(name, numbers, info.dataType)
    return made


def arrays(answer: Any, wanted: list[tuple[str, tuple[int, ...], str]]) -> list[Array]:
    """Return the outputs in one message.

    Args:
        wanted: name, shape and numpy's dtype of each output, in the order in which they are returned.
    """
    return [np.array(answer.getTensor(name), dtype=dtype).reshape(shape) for name, shape, dtype in wanted]
