"""Blocks: the unit of transfer, resume and delta.

A blob is cut into blocks of 64 KiB (the last may be shorter). Its *block map* is the concatenation of the 32-byte
SHA-256 of each block, in order. The digest of the map is stored in the bundle's manifest (annotation
``io.kedge.blocks``), so a device verifies the map before it requests a block, and each block on arrival. A blob of
one block needs no map: its own digest is the block's.

Answers on ``…/blk/{rid}`` are binary: a 16-byte header (big-endian: magic ``KBLK``, version, status, two reserved
bytes, block index, payload length), then the payload; if the status is not OK, the payload is a reason in UTF-8.
"""

from __future__ import annotations

import enum
import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path

from kedge_protocol.errors import MessageError, StorageError

BLOCK_SIZE = 64 * 1024
"""The payload size of a block in bytes."""
HASH_SIZE = 32
"""The size of one entry of a block map in bytes."""
MAX_MESSAGE_BYTES = 96 * 1024
"""The largest payload of a message on the wire, in bytes."""

_HEADER = struct.Struct(">4sBBHII")
_MAGIC = b"KBLK"
_VERSION = 1


class BlockStatus(enum.IntEnum):
    """The outcome of a block request."""

    OK = 0
    NOT_FOUND = 1
    REFUSED = 2
    BUSY = 3


@dataclass(frozen=True)
class BlockAnswer:
    """One answer: a block's payload, or the reason why there is none."""

    index: int
    status: BlockStatus
    payload: bytes | memoryview

    @property
    def reason(self) -> str:
        """Return the refusal in words; empty for OK."""
        return "" if self.status is BlockStatus.OK else bytes(self.payload).decode(errors="replace")


def block_count(size: int) -> int:
    """Return the number of blocks of a blob of ``size`` bytes; an empty blob has none."""
    return -(-size // BLOCK_SIZE)


def block_length(size: int, index: int) -> int:
    """Return the number of bytes of block ``index`` of a blob of ``size`` bytes."""
    return min(BLOCK_SIZE, size - index * BLOCK_SIZE)


def block_hash(data: bytes | memoryview) -> bytes:
    """Return the 32-byte hash of one block."""
    return hashlib.sha256(data).digest()


def map_of_file(path: Path) -> bytes:
    """Return the block map of a file.

    Raises:
        StorageError: the file cannot be read.
    """
    hashes = bytearray()
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK_SIZE):
                hashes += block_hash(block)
    except OSError as error:
        raise StorageError(f"cannot be read: {error.strerror}", where=str(path)) from error
    return bytes(hashes)


def encode_answer(index: int, payload: bytes, status: BlockStatus = BlockStatus.OK) -> bytes:
    """Encode one answer."""
    return _HEADER.pack(_MAGIC, _VERSION, status, 0, index, len(payload)) + payload


def decode_answer(raw: bytes, *, where: str = "block answer") -> BlockAnswer:
    """Decode one answer; the payload is not copied.

    Raises:
        MessageError: the magic, version, status or length is wrong.
    """
    if len(raw) < _HEADER.size:
        raise MessageError(f"{len(raw)} bytes are too few", where=where)
    magic, version, status, _, index, length = _HEADER.unpack_from(raw)
    if magic != _MAGIC or version != _VERSION:
        raise MessageError(f"unknown magic or version {magic!r} {version}", where=where)
    if length != len(raw) - _HEADER.size or length > BLOCK_SIZE:
        raise MessageError(f"{length} bytes were announced, {len(raw) - _HEADER.size} came", where=where)
    try:
        known = BlockStatus(status)
    except ValueError as error:
        raise MessageError(f"unknown status {status}", where=where) from error
    return BlockAnswer(index, known, memoryview(raw)[_HEADER.size :])
