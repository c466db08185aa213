"""One looked-at call as bytes, from the process that answered it to the shadow: a length, a head in JSON, and the
tensors one after another. They stay on the device, on a socket of its own."""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.errors import InputError

Array = npt.NDArray[Any]

LENGTH = struct.Struct("<II")
"""Bytes of the head, and of all tensors together."""
MAX_HEAD = 1 << 16
MAX_BYTES = 32 << 20
"""A call with larger tensors is not shown to a shadow."""
_KINDS = "fiub"


@dataclass(frozen=True, kw_only=True)
class Call:
    """An answered call.

    Attributes:
        digest: of the bundle that answered.
        nanoseconds: how long that took.
        inputs, outputs: by name, as the caller gave and got them.
    """

    digest: str
    nanoseconds: int
    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]


@contextlib.contextmanager
def address(path: Path) -> Iterator[str]:
    """Give a socket's path in a form that is short enough for the kernel (108 bytes), whatever folder it lies in."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def encode(call: Call) -> bytes | None:
    """Return the frame of a call; None if it is too large or holds what is no number."""
    arrays = [*call.inputs.values(), *call.outputs.values()]
    if sum(array.nbytes for array in arrays) > MAX_BYTES or any(array.dtype.kind not in _KINDS for array in arrays):
        return None
    described = [_described(named) for named in (call.inputs, call.outputs)]
    head = json.dumps({"digest": call.digest, "ns": call.nanoseconds, "in": described[0], "out": described[1]}).encode()
    if len(head) > MAX_HEAD:
        return None
    body = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)
    return LENGTH.pack(len(head), len(body)) + head + body


def _described(named: Mapping[str, Array]) -> list[list[Any]]:
    return [[name, array.dtype.str, list(array.shape)] for name, array in named.items()]


def decode(head: bytes, body: bytes) -> Call:
    """Return the call of a frame.

    Raises:
        InputError: it is none.
    """
    try:
        told = json.loads(head)
        at = 0
        parts: list[dict[str, Array]] = []
        for listed in (told["in"], told["out"]):
            named: dict[str, Array] = {}
            for name, kind, shape in listed:
                dtype = np.dtype(kind)
                if dtype.kind not in _KINDS or any(int(axis) < 0 for axis in shape):
                    raise ValueError("no tensor of numbers")
                size = dtype.itemsize * math.prod(map(int, shape))
                named[str(name)] = np.frombuffer(body[at : at + size], dtype).reshape(shape)
                at += size
            parts.append(named)
        if at != len(body):
            raise ValueError("the tensors do not fill the frame")
        return Call(digest=str(told["digest"]), nanoseconds=int(told["ns"]), inputs=parts[0], outputs=parts[1])
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise InputError(f"a frame is broken: {error}", where="shadow") from error
