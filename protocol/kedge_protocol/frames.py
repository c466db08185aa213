"""One answered call as bytes: a length, a head in JSON, and the tensors one after another. Calls travel so from the
process that answered them to a shadow, over a socket on the device; and home, where a device may send samples
(:mod:`kedge_protocol.samples`).

NumPy is loaded only to make or read tensors: the resident agent passes frames on by their heads.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from kedge_protocol.errors import InputError

if TYPE_CHECKING:
    import numpy.typing as npt

    Array: TypeAlias = npt.NDArray[Any]

LENGTH = struct.Struct("<II")
"""Bytes of the head, and of all tensors together."""
MAX_HEAD = 1 << 16
MAX_BYTES = 32 << 20
"""A call with larger tensors is not shown to anybody."""
_KINDS = "fiubU"


@dataclass(frozen=True, kw_only=True)
class Call:
    """An answered call.

    Attributes:
        digest: of the bundle that answered.
        nanoseconds: how long that took.
        inputs, outputs: by name, as the caller gave and got them; of one sample, with it along the first axis.
        confidence: of one sample: the largest probability of its answer; None where there is none.
        disagrees: of one sample: whether another bundle answers otherwise.
    """

    digest: str
    nanoseconds: int
    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]
    confidence: float | None = None
    disagrees: bool = False


@dataclass(frozen=True, kw_only=True)
class Head:
    """What the head of one sample's frame says.

    Attributes:
        inputs_size: bytes of the inputs, with which the body begins.
    """

    digest: str
    inputs_size: int
    confidence: float | None
    disagrees: bool


@contextlib.contextmanager
def address(path: Path) -> Iterator[str]:
    """Give a socket's path in a form that is short enough for the kernel (108 bytes), whatever folder it lies in."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def encode(call: Call) -> bytes | None:
    """Return the frame of a call; None if it is too large or holds what is neither number nor text."""
    import numpy as np

    arrays = [*call.inputs.values(), *call.outputs.values()]
    if sum(array.nbytes for array in arrays) > MAX_BYTES or any(array.dtype.kind not in _KINDS for array in arrays):
        return None
    told = {
        "digest": call.digest,
        "ns": call.nanoseconds,
        "in": _described(call.inputs),
        "out": _described(call.outputs),
        "size": sum(array.nbytes for array in call.inputs.values()),
        "confidence": call.confidence,
        "disagrees": call.disagrees,
    }
    head = json.dumps(told).encode()
    if len(head) > MAX_HEAD:
        return None
    body = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)
    return LENGTH.pack(len(head), len(body)) + head + body


def _described(named: Mapping[str, Array]) -> list[list[Any]]:
    return [[name, array.dtype.str, list(array.shape)] for name, array in named.items()]


def read_head(head: bytes) -> Head:
    """Return what a head says, without NumPy.

    Raises:
        InputError: it is none.
    """
    try:
        told = json.loads(head)
        sure = told["confidence"]
        return Head(
            digest=str(told["digest"]),
            inputs_size=int(told["size"]),
            confidence=None if sure is None or not math.isfinite(sure) else float(sure),
            disagrees=bool(told["disagrees"]),
        )
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise InputError(f"a frame is broken: {error}", where="frame") from error


def decode(head: bytes, body: bytes) -> Call:
    """Return the call of a frame.

    Raises:
        InputError: it is none.
    """
    import numpy as np

    own = read_head(head)
    try:
        told = json.loads(head)
        at = 0
        parts: list[dict[str, Array]] = []
        for listed in (told["in"], told["out"]):
            named: dict[str, Array] = {}
            for name, kind, shape in listed:
                dtype = np.dtype(kind)
                if dtype.kind not in _KINDS or any(int(axis) < 0 for axis in shape):
                    raise ValueError("no tensor of numbers or texts")
                size = dtype.itemsize * math.prod(map(int, shape))
                named[str(name)] = np.frombuffer(body[at : at + size], dtype).reshape(shape)
                at += size
            parts.append(named)
        if at != len(body):
            raise ValueError("the tensors do not fill the frame")
        return Call(
            digest=own.digest,
            nanoseconds=int(told["ns"]),
            inputs=parts[0],
            outputs=parts[1],
            confidence=own.confidence,
            disagrees=own.disagrees,
        )
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise InputError(f"a frame is broken: {error}", where="frame") from error


def split(raw: bytes) -> list[tuple[bytes, bytes]]:
    """Return the heads and bodies of frames that follow one another.

    Raises:
        InputError: they do not end where the bytes do.
    """
    found, at = [], 0
    while at < len(raw):
        if at + LENGTH.size > len(raw):
            raise InputError("the last frame is cut off", where="frame")
        of_head, of_body = LENGTH.unpack_from(raw, at)
        at += LENGTH.size
        if of_head > MAX_HEAD or of_body > MAX_BYTES or at + of_head + of_body > len(raw):
            raise InputError("a frame is longer than its bytes", where="frame")
        found.append((raw[at : at + of_head], raw[at + of_head : at + of_head + of_body]))
        at += of_head + of_body
    return found
