"""Between what a caller gives and gets and what a model's file takes and gives: axes and quantization.

Affine quantization as in Jacob et al. 2018 (arXiv:1712.05877), eq. 1: ``real = (q - zero_point) * scale``; rounding
is half to even, as in ONNX's QuantizeLinear.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.bundle.config import TensorSpec
from kedge_protocol.errors import InputError

Array = npt.NDArray[Any]


def check_input(array: Array, spec: TensorSpec) -> None:
    """Check a batch of samples against an input: rank, fixed axes, a numeric dtype.

    Raises:
        InputError: the message names the input, what came and what it takes.
    """
    expected = spec.shape
    if array.dtype.kind not in "fiub":
        raise InputError(f"dtype {array.dtype} is not numeric", where=f"input {spec.name!r}")
    fits = array.ndim == len(expected) and all(
        want is None or want == have for want, have in zip(expected[1:], array.shape[1:], strict=False)
    )
    if not fits:
        want = "x".join("?" if axis is None else str(axis) for axis in expected)
        have = "x".join(map(str, array.shape))
        raise InputError(
            f"shape {have} does not fit {want} (first axis is the batch)",
            where=f"input {spec.name!r}",
        )


def to_file(array: Array, spec: TensorSpec) -> Array:
    """A model input (after preprocessing) as the file takes it: axes moved, quantized, cast, contiguous."""
    file = spec.file
    if file.permutation is not None:
        array = array.transpose(file.permutation)
    dtype = np.dtype(file.dtype)
    if file.scale is None:
        return np.ascontiguousarray(array, dtype=dtype)
    info = np.iinfo(dtype)
    scaled = np.multiply(array, np.float32(1.0 / file.scale), dtype=np.float32)
    np.rint(scaled, out=scaled)
    scaled += np.float32(file.zero_point or 0)
    np.clip(scaled, info.min, info.max, out=scaled)
    return np.ascontiguousarray(scaled.astype(dtype))


def from_file(array: Array, spec: TensorSpec) -> Array:
    """A file's output as the caller gets it: real numbers in the model's dtype and axes."""
    file = spec.file
    if file.scale is not None:
        array = (array.astype(np.float32) - np.float32(file.zero_point or 0)) * np.float32(file.scale)
    if file.permutation is not None:
        array = array.transpose(np.argsort(file.permutation))
    return np.ascontiguousarray(array, dtype=np.dtype(spec.dtype))
