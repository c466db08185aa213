"""Converts between the caller's tensors and those of a model's file: axes and quantization.

Affine quantization as in Jacob et al. 2018 (arXiv:1712.05877), eq. 1: ``real = (q - zero_point) * scale``; rounding
is half to even and the division is a division, as in ONNX's QuantizeLinear.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.bundle.config import NO_BATCH, TEXT, TensorSpec
from kedge_protocol.errors import InputError

Array = npt.NDArray[Any]
Conversion = Callable[[Array], Array]


def as_array(raw: Any, spec: TensorSpec) -> Array:
    """Return ``raw`` as a NumPy array; an array is returned unchanged, but for objects and bytes given as texts.

    Raises:
        InputError: NumPy cannot make an array, e.g. from lists of different lengths; or a text is none.
    """
    try:
        array = np.asarray(raw)
    except ValueError as error:
        raise InputError(f"no array can be made of it: {error}", where=f"input {spec.name!r}") from error
    return texts(array, where=f"input {spec.name!r}") if spec.dtype == TEXT and array.dtype.kind in "OS" else array


def texts(array: Array, *, where: str) -> Array:
    """Return an array of texts in NumPy's own dtype of Unicode, from one of objects (``str``, or ``bytes`` of UTF-8) or
    of bytes.

    Raises:
        InputError: an element is neither, or its bytes are not UTF-8.
    """
    made = []
    for one in array.reshape(-1).tolist():
        try:
            text = one.decode() if isinstance(one, bytes) else one
        except UnicodeDecodeError as error:
            raise InputError(f"a text is not UTF-8: {error}", where=where) from error
        if not isinstance(text, str):
            raise InputError(f"{type(one).__name__} is no text", where=where)
        made.append(text)
    return np.array(made, dtype=TEXT).reshape(array.shape)


def check_input(array: Array, spec: TensorSpec) -> None:
    """Check a batch of samples against an input: rank, fixed axes, numbers or texts.

    Raises:
        InputError: the array does not fit; the message names the input, the array's shape and the expected one.
    """
    expected = spec.shape
    if spec.dtype == TEXT:
        if array.dtype.kind != "U":
            raise InputError(f"dtype {array.dtype} is no text", where=f"input {spec.name!r}")
    elif array.dtype.kind not in "fiub":
        # A path or a text for a pipeline, which the bundle does not have.
        remedy = None if array.ndim else "Give numbers; files and texts need a pipeline, see `kedge compile --task`"
        raise InputError(f"dtype {array.dtype} is not numeric", where=f"input {spec.name!r}", remedy=remedy)
    fits = array.ndim == len(expected) and all(
        want is None or want == have or at == spec.batch_axis
        for at, (want, have) in enumerate(zip(expected, array.shape, strict=True))
    )
    if not fits:
        want = "x".join("?" if axis is None else str(axis) for axis in expected)
        have = "x".join(map(str, array.shape))
        axis = _ORDINALS.get(spec.batch_axis, f"axis {spec.batch_axis} is the batch")
        sent = f"shape {have}" if have else "one number"
        raise InputError(f"{sent} does not fit {want or 'one number'} ({axis})", where=f"input {spec.name!r}")


_ORDINALS = {0: "first axis is the batch", 1: "second axis is the batch", NO_BATCH: "it has no batch axis"}


def to_batch_first(array: Array, spec: TensorSpec) -> Array:
    """Return a tensor in the caller's axes with the batch axis first; a tensor without a batch becomes one sample."""
    if spec.batch_axis == 0:
        return array
    return array[np.newaxis] if not spec.batched else np.moveaxis(array, spec.batch_axis, 0)


def from_batch_first(array: Array, spec: TensorSpec) -> Array:
    """Undo :func:`to_batch_first`; for a tensor without a batch, return the first sample's."""
    if spec.batch_axis == 0:
        return array
    return array[0] if not spec.batched else np.moveaxis(array, 0, spec.batch_axis)


def encoder(spec: TensorSpec, *, reuse: bool = False) -> Conversion:
    """Return :func:`to_file` for many arrays; everything that does not depend on the samples is computed once.

    Args:
        spec: the input's spec.
        reuse: the arrays passed are float32 and may be overwritten.
    """
    file = spec.file
    dtype = np.dtype(file.dtype)
    permutation = file.permutation
    if file.scale is None:
        if permutation is None:
            return lambda array: np.ascontiguousarray(array, dtype=dtype)
        return lambda array: np.ascontiguousarray(array.transpose(permutation), dtype=dtype)
    info = np.iinfo(dtype)
    lowest, highest = np.float32(info.min), np.float32(info.max)
    scale, zero_point = np.float32(file.scale), np.float32(file.zero_point or 0)

    def quantize(array: Array) -> Array:
        if permutation is not None:
            array = array.transpose(permutation)
        scaled = np.divide(array, scale, out=array if reuse else None, dtype=np.float32)
        np.rint(scaled, out=scaled)
        np.add(scaled, zero_point, out=scaled)
        scaled.clip(lowest, highest, out=scaled)
        try:
            # What a cast makes of a NaN differs between processors.
            with np.errstate(invalid="raise"):
                return np.ascontiguousarray(scaled.astype(dtype))
        except FloatingPointError as error:
            raise InputError(
                "holds NaN, a quantized model has no number for it", where=f"input {spec.name!r}"
            ) from error

    return quantize


def decoder(spec: TensorSpec) -> Conversion:
    """Return :func:`from_file` for many arrays; everything that does not depend on the samples is computed once."""
    file = spec.file
    dtype = np.dtype(spec.dtype)
    back = None if file.permutation is None else tuple(int(axis) for axis in np.argsort(file.permutation))
    scale = None if file.scale is None else np.float32(file.scale)
    zero_point = np.float32(file.zero_point or 0)

    def turn(array: Array) -> Array:
        if scale is not None:
            array = array.astype(np.float32)
            np.subtract(array, zero_point, out=array)
            np.multiply(array, scale, out=array)
        if back is not None:
            array = array.transpose(back)
        return np.ascontiguousarray(array, dtype=dtype)

    return turn


def to_file(array: Array, spec: TensorSpec) -> Array:
    """Convert a model input (after preprocessing) to the file's form: transposed, quantized, cast, contiguous.

    Raises:
        InputError: the input has NaN and the file is quantized.
    """
    return encoder(spec)(array)


def from_file(array: Array, spec: TensorSpec) -> Array:
    """Convert a file's output to the caller's form: real numbers in the model's dtype and axes."""
    return decoder(spec)(array)
