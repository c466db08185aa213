"""Tensors as JSON: numbers, flat in row-major order or nested.

They are read and written by orjson if it is installed, otherwise by the standard library, with the same result. A body
is scanned before it is parsed, since as objects brackets cost up to thirty times their bytes.
"""

from __future__ import annotations

import contextlib
import json
import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from kedge_agent.serving.datatypes import DATATYPES, Array, checked_datatype, checked_shape
from kedge_protocol.bundle.config import TEXT, TensorSpec
from kedge_protocol.errors import InputError

orjson: Any = None
with contextlib.suppress(ImportError):  # an extra of the agent
    import orjson as _orjson

    orjson = _orjson

_MAX_DEPTH = 64
_SPARE_BRACKETS = 512
_SPARE_STRINGS = 1024
_DIGITS = bytes(range(0x30, 0x3A))
_SMALL_BODY = 32 << 10
"""Bytes of a body that is not scanned: as objects it takes no more than a megabyte."""


def parse(body: bytes, inputs: Sequence[TensorSpec]) -> dict[str, Any]:
    """Return the JSON object of a request.

    Args:
        body: UTF-8.
        inputs: the model's inputs; they bound the number of brackets and strings.

    Raises:
        InputError: it is not a JSON object, or has more brackets or strings than a request for this model can need.
    """
    if len(body) > _SMALL_BODY:
        scan(body, inputs)
    try:
        if orjson is not None:
            request = orjson.loads(body)
        else:
            text = body.decode("utf-8")
            request = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
            if "\\ud" in text.lower():
                json.dumps(request, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise InputError(f"the body is not JSON: {error}") from error
    if not isinstance(request, dict):
        raise InputError("the body is not a JSON object")
    return request


def scan(body: bytes, inputs: Sequence[TensorSpec]) -> None:
    """Bound the number of objects that a body becomes, by counting bytes.

    Each number needs a digit and each nested list at least one number below it, so a request has no more brackets than
    digits times the deepest nesting; a request with few numbers has few.

    Raises:
        InputError: the body has more brackets or strings than a request for these inputs can need.
    """
    brackets = body.count(b"[") + body.count(b"{")
    if brackets > _SPARE_BRACKETS:
        digits = len(body) - len(body.translate(None, _DIGITS))
        nested = max((_lists_a_number(spec) for spec in inputs), default=1.0)
        if brackets > _SPARE_BRACKETS + nested * digits:
            raise InputError("the body has more brackets than tensors of this model can need")
        if _depth(body) > _MAX_DEPTH:
            raise InputError("the body is nested too deep")
    if not any(spec.dtype == TEXT for spec in inputs):
        quotes = body.count(b'"')
        if quotes > 2 * _SPARE_STRINGS:
            raise InputError("the body has more strings than a request for this model can need")


def _lists_a_number(spec: TensorSpec) -> float:
    """Return the number of lists of a nested tensor for each of its numbers: 1 for an innermost list of one number,
    plus its share of the lists around it."""
    lists, numbers = 0.0, 1.0
    for axis in reversed(spec.shape[1:]):
        lists = lists * (axis or 1) + 1
        numbers *= axis or 1
    return (lists + 1) / numbers


def _depth(body: bytes) -> int:
    """Return the deepest nesting of brackets, including those in strings."""
    codes = np.frombuffer(body, np.uint8)
    steps = codes[(codes == 0x5B) | (codes == 0x7B) | (codes == 0x5D) | (codes == 0x7D)]
    opened = (steps == 0x5B) | (steps == 0x7B)
    return int(np.cumsum(np.where(opened, np.int8(1), np.int8(-1)), dtype=np.int32).max(initial=0))


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number in JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:40]} is beyond the range of a double")
    return number


def array_of(item: dict[str, Any], *, where: str, truths: bool = True) -> Array:
    """Return a request's tensor, checked against its own datatype and shape.

    Args:
        item: the tensor's object in the request.
        where: for error messages.
        truths: whether to look for booleans among the numbers, because the body may have some.

    Returns:
        The tensor in its stated datatype; BYTES as an array of ``bytes`` objects.

    Raises:
        InputError: the tensor is wrong; the message says what.
    """
    datatype = checked_datatype(item.get("datatype"), where=where)
    shape = checked_shape(item.get("shape"), where=where)
    data = item.get("data")
    if not isinstance(data, list):
        raise InputError("'data' is not a list", where=where)
    if datatype == "BYTES":
        return _texts(data, shape, where=where)
    if not truths and (packed := _packed(data, shape, datatype)) is not None:
        return packed
    values = _numbers(data, shape, datatype, where=where, truths=truths)
    dtype = np.dtype(DATATYPES[datatype])
    with np.errstate(over="ignore"):
        array = values.astype(dtype)
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise InputError(f"'data' is out of the range of {datatype}", where=where)
    return _rounded_to_bf16(array, where=where) if datatype == "BF16" else array


def _packed(data: list[Any], shape: list[int], datatype: str) -> Array | None:
    """Return a flat list of numbers as an array of floats, in a third of numpy's time; None if it is not one, or does
    not fit: then the general way finds out why."""
    code = {"FP32": "f", "FP64": "d"}.get(datatype)
    count = math.prod(shape)
    if code is None or len(data) != count:
        return None
    try:
        array = np.frombuffer(bytearray(struct.pack(f"={count}{code}", *data)), code)
    except (struct.error, OverflowError, ValueError):
        return None
    return array.reshape(shape) if np.isfinite(array).all() else None


def _numbers(data: list[Any], shape: list[int], datatype: str, *, where: str, truths: bool) -> Array:
    """Return numbers of the right kind, in range and in the shape, in any dtype that holds them."""
    dtype = np.dtype(DATATYPES[datatype])
    try:
        values = np.asarray(data)
    except (ValueError, OverflowError) as error:
        raise InputError(f"'data' is no tensor: {error}", where=where) from error
    if values.size != math.prod(shape):
        raise InputError(f"{values.size} numbers do not fill the shape {shape}", where=where)
    if values.ndim > 1 and list(values.shape) != shape:
        raise InputError(f"'data' is nested as {list(values.shape)}, the shape is {shape}", where=where)
    allowed = {"b": "b", "i": "iu", "u": "iu", "f": "fiu"}[dtype.kind]
    if values.dtype.kind == "O" or (dtype.kind in "iu" and values.dtype.kind == "f"):
        try:
            values = _exact(data, values, dtype.kind)
        except OverflowError as error:
            raise InputError(f"'data' is out of the range of {datatype}", where=where) from error
    if values.size and values.dtype.kind not in allowed:
        raise InputError(f"'data' is not of datatype {datatype}", where=where)
    if truths and dtype.kind != "b" and values.dtype.kind != "b" and values.size and _holds_truths(data):
        raise InputError(f"'data' holds true or false among numbers of {datatype}", where=where)
    if dtype.kind in "iu" and values.size:
        limits = np.iinfo(dtype)
        if int(values.min()) < limits.min or int(values.max()) > limits.max:
            raise InputError(f"'data' is out of the range of {datatype}", where=where)
    return values.reshape(shape)


def _holds_truths(data: list[Any]) -> bool:
    """Return whether a list of numbers, nested or not, holds a boolean, which numpy would take for a number."""
    if data and isinstance(data[0], list):
        return any(_holds_truths(inner) for inner in data)
    return bool in set(map(type, data))


def _exact(data: list[Any], values: Array, kind: str) -> Array:
    """Return numbers for which numpy chooses another kind of dtype: floats for integers that no single integer dtype
    holds (1 and 2**63), objects for integers beyond 64 bits.

    Raises:
        OverflowError: no dtype can hold them.
    """
    exact = np.array(data, dtype=object)
    types = {type(number) for number in exact.flat}
    if kind == "f":
        return exact.astype("float64") if types <= {int, float} else values
    if types != {int}:
        return values
    if not all(0 <= number < 1 << 64 for number in exact.flat):
        raise OverflowError
    return exact.astype("uint64")


def _texts(data: list[Any], shape: list[int], *, where: str) -> Array:
    flat: list[Any] = data
    for _ in range(len(shape) - 1):
        if not flat or not all(isinstance(inner, list) for inner in flat):
            break
        flat = [text for inner in flat for text in inner]
    if not all(isinstance(text, str) for text in flat):
        raise InputError("'data' is not of datatype BYTES: texts are needed", where=where)
    if len(flat) != math.prod(shape):
        raise InputError(f"{len(flat)} texts do not fill the shape {shape}", where=where)
    array = np.empty(len(flat), dtype=object)
    array[:] = [text.encode() for text in flat]
    return array.reshape(shape)


def _rounded_to_bf16(array: Array, *, where: str) -> Array:
    """Return float32 rounded to the nearest number with bfloat16's 8 bits, ties to even."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) & np.uint32(0xFFFF0000)
    made = rounded.view(np.float32)
    if not np.isfinite(made).all():
        raise InputError("'data' is out of the range of BF16", where=where)
    return made


def encoded(content: dict[str, Any]) -> bytes:
    """Return an answer as JSON; arrays in it are written flat, float32 with the fewest digits that round-trip.

    Raises:
        ValueError: a number that JSON cannot represent (NaN, infinity).
    """
    if orjson is not None:
        return bytes(orjson.dumps(content, default=_plain, option=orjson.OPT_SERIALIZE_NUMPY))
    return json.dumps(content, allow_nan=False, separators=(",", ":"), default=_plain).encode()


def data_of(array: Array) -> Any:
    """Return a tensor's numbers for :func:`encoded`.

    Raises:
        ValueError: JSON cannot say it; the text names what.
    """
    flat = np.ascontiguousarray(array).reshape(-1)
    if flat.dtype.kind == "f":
        if not np.isfinite(flat).all():
            raise ValueError("NaN or infinity")
        if flat.dtype == np.float16:
            flat = flat.astype(np.float32)
    if flat.dtype.kind == "O":
        try:
            return [text.decode("utf-8") if isinstance(text, bytes) else str(text) for text in flat]
        except UnicodeDecodeError as error:
            raise ValueError("bytes that are no UTF-8") from error
    if orjson is not None:
        return flat
    # The double that has the same few digits is written with them.
    return [float(text) for text in flat.astype("U")] if flat.dtype == np.float32 else flat.tolist()


def _plain(value: object) -> Any:
    raise TypeError(f"{type(value).__name__} has no form in JSON")
