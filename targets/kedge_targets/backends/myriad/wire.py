"""Arrays to depthai's messages and back. numpy and the standard library only: the library itself is given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

DTYPES: dict[str, np.dtype[Any]] = {"FP16": np.dtype(np.float16), "U8F": np.dtype(np.uint8), "INT": np.dtype(np.int32)}
"""depthai's names of what an input or output of a blob can hold (``TensorInfo.DataType``)."""


def message(depthai: Any, tensors: list[tuple[str, Any, Array]]) -> Any:
    """One message with all inputs.

    Args:
        tensors: name, the blob's description (``TensorInfo``) and array of each input; an array has the input's shape
            and is turned into the numbers that the blob takes.
    """
    made = depthai.NNData()
    for name, info, array in tensors:
        numbers = np.asarray(array).astype(DTYPES[info.dataType.name], order="C", copy=False)
        made.addTensor(name, numbers, info.dataType)
    return made


def arrays(answer: Any, wanted: list[tuple[str, tuple[int, ...], str]]) -> list[Array]:
    """The outputs of one message.

    Args:
        wanted: name, shape and numpy's dtype of each output, in the order that they are to come in.
    """
    return [np.array(answer.getTensor(name), dtype=dtype).reshape(shape) for name, shape, dtype in wanted]
