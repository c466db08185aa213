"""Samples that a device sends home, where its configuration allows it and a signed desired state asks for it: the
request, what the device reports of it, and the chunks in which they travel.

What travels is a file of frames (:mod:`kedge_protocol.frames`), cut into chunks on ``tele/samples``. The controller
answers each chunk with a command ``samples`` that says how many bytes it has; the device goes on from there, after a
restart of either side too. A chunk that comes twice is only answered again.
"""

from __future__ import annotations

import enum
import re
import struct
from dataclasses import dataclass

from kedge_protocol.errors import MessageError

STREAM = "samples"
"""The level below ``tele``, and the verb of the controller's answers."""
CHUNK_BYTES = 48 << 10
MAX_COUNT = 10_000
MAX_BYTES = 256 << 20
MAX_SECONDS = 7 * 86400.0

_RID = re.compile(r"[0-9a-f]{16}\Z")
_HEADER = struct.Struct("<4s16sQQ32s")
_MAGIC = b"KSM1"


class Choice(str, enum.Enum):
    """Which samples are hard."""

    DISAGREE = "disagree"  # a shadow, or the bundle before, answers otherwise: any of them, each equally likely
    LOW_CONFIDENCE = "low-confidence"  # those of which the model is least sure


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """What a device is asked to send of one model.

    Attributes:
        rid: the request's number, 16 hexadecimal digits.
        where: which samples.
        count, max_bytes: how many at most, and how many bytes at most; a device may allow less.
        seconds: how long the device looks at its calls before it sends what it chose.
        below: for ``low-confidence``: only samples with less confidence than this.
    """

    rid: str
    where: Choice
    count: int
    max_bytes: int
    seconds: float
    below: float = 1.0

    def check(self, *, where: str) -> None:
        """Check the ranges.

        Raises:
            MessageError: one does not hold.
        """
        sane = 1 <= self.count <= MAX_COUNT and 1 <= self.max_bytes <= MAX_BYTES
        if not _RID.match(self.rid) or not sane or not 0 < self.seconds <= MAX_SECONDS or not 0 < self.below <= 1:
            raise MessageError("a request for samples is out of range", where=where)


class SampleState(str, enum.Enum):
    """How far a device is with a request."""

    COLLECTING = "collecting"
    SENDING = "sending"
    DONE = "done"  # the controller has all
    REFUSED = "refused"  # this device does not send any
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class ReportedSamples:
    """What a device says of a request.

    Attributes:
        seen: samples that it looked at.
        kept, size: samples that it chose so far, and their bytes.
        detail: why it refuses, or what bounds it.
    """

    rid: str
    state: SampleState
    seen: int = 0
    kept: int = 0
    size: int = 0
    detail: str | None = None


@dataclass(frozen=True, kw_only=True)
class SampleChunk:
    """A part of a device's file of frames.

    Attributes:
        offset, total: where the part begins, and the bytes of the whole file.
        checksum: SHA-256 of the whole file.
    """

    rid: str
    offset: int
    total: int
    checksum: bytes
    payload: bytes

    def encode(self) -> bytes:
        """Return the message."""
        return _HEADER.pack(_MAGIC, self.rid.encode(), self.offset, self.total, self.checksum) + self.payload


def decode_chunk(raw: bytes, *, where: str) -> SampleChunk:
    """Parse a message.

    Raises:
        MessageError: it is no chunk.
    """
    try:
        magic, rid, offset, total, checksum = _HEADER.unpack_from(raw)
        chunk = SampleChunk(
            rid=rid.decode("ascii"), offset=offset, total=total, checksum=checksum, payload=raw[_HEADER.size :]
        )
    except (struct.error, UnicodeDecodeError) as error:
        raise MessageError(f"a chunk of samples is broken: {error}", where=where) from error
    size = len(chunk.payload)
    sane = magic == _MAGIC and _RID.match(chunk.rid) and 0 < size <= CHUNK_BYTES
    if not sane or not chunk.offset + size <= chunk.total <= MAX_BYTES:
        raise MessageError("a chunk of samples is broken", where=where)
    return chunk
