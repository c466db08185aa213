"""Tracks the blocks of one blob or block map: finished, requested and wanted."""

from __future__ import annotations

import enum
from collections import deque

from kedge_protocol import digest as digests
from kedge_protocol.bitmaps import bit_is_set, encode_bitmap
from kedge_protocol.blocks import BLOCK_SIZE, HASH_SIZE, block_count, block_hash, block_length
from kedge_protocol.messages import BlobKind, BlockRequest

MAX_BROKEN = 3
"""Number of wrong answers for one block before the transfer fails."""


class Verdict(enum.Enum):
    """The verdict on one block."""

    NEW = enum.auto()
    KNOWN = enum.auto()
    BROKEN = enum.auto()


class Transfer:
    """The state of one transfer.

    Args:
        digest: digest of the blob (also for its map).
        kind: whether the blob or its map is transferred.
        size: number of bytes to pull.
        whole: digest of those bytes.
        hashes: the block map; with it each block is checked on arrival and written to disk by the caller. Without it
            the bytes are collected in memory and checked as a whole.
        have: bitmap of blocks that are already on disk.
    """

    def __init__(
        self, digest: str, kind: BlobKind, size: int, whole: str, *, hashes: bytes | None = None, have: bytes = b""
    ) -> None:
        self.digest = digest
        self.kind = kind
        self.size = size
        self.count = block_count(size)
        self.have = bytearray(have.ljust((self.count + 7) // 8, b"\0"))
        self.asked: dict[int, str] = {}
        self.paused_until = 0.0
        self.busy = 0
        self._whole = whole
        self._hashes = hashes
        self._buffer = None if hashes is not None else bytearray(size)
        self._broken: dict[int, int] = {}
        missing = [index for index in range(self.count) if not bit_is_set(self.have, index)]
        self.done = self.count - len(missing)
        # A block that occurs twice in a blob is pulled once.
        self._twins = _twins(missing, hashes) if hashes is not None else {}
        followers = {index for twins in self._twins.values() for index in twins[1:]}
        self._wanted = deque(index for index in missing if index not in followers)

    @property
    def finished(self) -> bool:
        """Return whether every block is finished."""
        return self.done == self.count

    @property
    def on_disk(self) -> bool:
        """Return whether blocks are written to disk as they arrive."""
        return self._buffer is None

    @property
    def wants(self) -> int:
        """Return how many blocks could be requested now."""
        return len(self._wanted)

    def take(self, most: int, rid: str) -> list[int]:
        """Take the next wanted blocks, now requested by ``rid``."""
        taken: list[int] = []
        while self._wanted and len(taken) < most:
            index = self._wanted.popleft()
            if not bit_is_set(self.have, index) and index not in self.asked:
                self.asked[index] = rid
                taken.append(index)
        return taken

    def request(self, indices: list[int], boot_id: str) -> BlockRequest:
        """Return the request message. Blocks held only in memory do not count as finished: a restart loses them."""
        have = encode_bitmap(self.have) if self.on_disk else ""
        return BlockRequest(digest=self.digest, kind=self.kind, blocks=indices, have=have, boot_id=boot_id)

    def forget_asked(self) -> None:
        """Mark all requested blocks as wanted again, before others, after their answers were lost."""
        self._wanted.extendleft(sorted(self.asked, reverse=True))
        self.asked.clear()

    def want_again(self, index: int) -> None:
        """Mark a block as wanted again after a busy answer."""
        if self.asked.pop(index, None) is not None:
            self._wanted.appendleft(index)

    def accept(self, index: int, payload: bytes | memoryview) -> tuple[Verdict, list[int]]:
        """Check one block.

        Returns:
            The verdict, and for a new block the indices where its bytes belong (several if the block occurs
            repeatedly).
        """
        if index >= self.count or bit_is_set(self.have, index):
            return Verdict.KNOWN, []
        fits = len(payload) == block_length(self.size, index)
        expected = b""
        if fits and self._hashes is not None:
            expected = self._hashes[index * HASH_SIZE : (index + 1) * HASH_SIZE]
            fits = block_hash(payload) == expected
        if not fits:
            self._broken[index] = self._broken.get(index, 0) + 1
            self.want_again(index)
            return Verdict.BROKEN, []
        places = self._twins.get(expected) or [index]
        fresh = [place for place in places if not bit_is_set(self.have, place)]
        for place in fresh:
            self.asked.pop(place, None)
            self.have[place >> 3] |= 1 << (place & 7)
        self.done += len(fresh)
        if self._buffer is not None:
            self._buffer[index * BLOCK_SIZE : index * BLOCK_SIZE + len(payload)] = payload
        return Verdict.NEW, fresh

    def given_up(self, index: int) -> bool:
        """Return whether the block arrived damaged so often that the transfer fails."""
        return self._broken.get(index, 0) >= MAX_BROKEN

    def data(self) -> bytes | None:
        """Return the collected bytes; None if they do not match their digest, and all blocks are wanted again."""
        raw = bytes(self._buffer or b"")
        if digests.of_bytes(raw) == self._whole:
            return raw
        self.have = bytearray(len(self.have))
        self.done = 0
        self._wanted = deque(range(self.count))
        for index in range(max(self.count, 1)):
            self._broken[index] = self._broken.get(index, 0) + 1
        return None


def _twins(indices: list[int], hashes: bytes) -> dict[bytes, list[int]]:
    """Return hash → indices of the blocks that occur more than once."""
    places: dict[bytes, list[int]] = {}
    for index in indices:
        places.setdefault(hashes[index * HASH_SIZE : (index + 1) * HASH_SIZE], []).append(index)
    return {key: found for key, found in places.items() if len(found) > 1}
