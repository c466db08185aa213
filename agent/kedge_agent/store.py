"""Stores blobs on the device's disk: complete blobs, partial blobs and block maps.

::

    STATE/blobs/sha256/HEX   complete and checked; read-only, slots are hard links to it
    STATE/maps/HEX           block map of the blob HEX, checked against the manifest that named it
    STATE/partial/HEX        an unfinished blob

There is no journal: a block of a partial file is finished when its hash matches the map. A killed process or a power
cut can only lose blocks.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from kedge_agent.files import storage_errors
from kedge_agent.update.events import BlobOpened
from kedge_protocol import digest as digests
from kedge_protocol import files
from kedge_protocol.bitmaps import bit_is_set
from kedge_protocol.blocks import BLOCK_SIZE, HASH_SIZE, block_count, block_hash, block_length
from kedge_protocol.bundle.layout import Bundle
from kedge_protocol.errors import DigestMismatchError, KedgeError

log = logging.getLogger(__name__)

_CHUNK = 1 << 20


class Store:
    """The blobs of one device. One thread at a time may use it; :meth:`write` may come from another.

    Args:
        state: the agent's state folder. If it exists and is not writable, each operation that needs to write raises its
            error.

    Raises:
        StorageError: the folder does not exist and cannot be created.
    """

    def __init__(self, state: Path) -> None:
        self.state = state
        self._blobs = state / "blobs" / "sha256"
        self._maps = state / "maps"
        self._partial = state / "partial"
        self._files: dict[str, int] = {}
        # A file descriptor must not be closed, and perhaps given to another file, in the middle of a write.
        self._writing = threading.Lock()
        for folder in (self._blobs, self._maps, self._partial):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                if not state.is_dir():
                    with storage_errors(state):
                        raise
                log.error("%s cannot be made: %s", folder, error.strerror)

    def blob_path(self, digest: str) -> Path:
        """Return the path of a complete blob, which may not exist."""
        return self._blobs / digests.hex_of(digest)

    def has(self, digest: str, size: int) -> bool:
        """Return whether the blob is complete. It was checked when it arrived."""
        try:
            return self.blob_path(digest).stat().st_size == size
        except OSError:
            return False

    def free_bytes(self) -> int:
        """Return the free space, for an ordinary user, of the disk with the state folder."""
        return shutil.disk_usage(self.state).free

    def missing_bytes(self, bundle: Bundle) -> int:
        """Return the bytes still to be written for a bundle's files, without those already in partial files."""
        missing = 0
        for digest, size in {layer.digest: layer.size for layer in bundle.manifest.layers}.items():
            if not self.has(digest, size):
                written = 0
                with contextlib.suppress(OSError):
                    written = (self._partial / digests.hex_of(digest)).stat().st_blocks * 512
                missing += max(0, size - written)
        return missing

    def open(
        self,
        digest: str,
        size: int,
        *,
        map_digest: str | None = None,
        block_map: bytes | None = None,
        read: bool = False,
    ) -> BlobOpened:
        """Open a blob: find out what exists of it, and prepare :meth:`write` if its map is known.

        Args:
            map_digest: digest of the block map; None if there is none.
            block_map: the checked map, to be stored.
            read: whether to return the bytes of a complete blob.

        Returns:
            The event for the update machine; ``error`` is set if the disk fails.
        """
        try:
            with storage_errors(self._partial):
                return self._open(digest, size, map_digest, block_map, read)
        except KedgeError as error:
            return BlobOpened(digest=digest, error=str(error))

    def _open(self, digest: str, size: int, map_digest: str | None, block_map: bytes | None, read: bool) -> BlobOpened:
        path = self.blob_path(digest)
        if self.has(digest, size):
            if not read:
                return BlobOpened(digest=digest, complete=True)
            data = path.read_bytes()
            if digests.of_bytes(data) == digest:
                return BlobOpened(digest=digest, complete=True, data=data)
            path.unlink()  # the disk changed it; it is pulled again
        if map_digest is None:
            return BlobOpened(digest=digest)
        hashes = self._map(digest, size, map_digest, block_map)
        if hashes is None:
            return BlobOpened(digest=digest)
        self.close(digest)
        file = os.open(self._partial / path.name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.ftruncate(file, size)
            have = _finished(file, size, hashes)
            self._copy(path.name, file, size, hashes, have)
        except BaseException:
            os.close(file)
            raise
        self._files[digest] = file
        return BlobOpened(digest=digest, block_map=hashes, have=bytes(have))

    def write(self, digest: str, index: int, payload: bytes | memoryview) -> None:
        """Write a checked block of an open blob.

        Raises:
            OSError: the disk is full, or the blob is not open.
        """
        with self._writing:
            file = self._files.get(digest)
            if file is None:
                raise OSError(f"{digest} is not open")
            _write(file, payload, index * BLOCK_SIZE)

    def finish(self, digest: str) -> None:
        """Finish an open blob after all its blocks are written: check it, sync it, and move it into place.

        Raises:
            DigestMismatchError: the blob does not match its digest; it is deleted.
            StorageError: the disk is full, or the blob is not open.
        """
        path = self.blob_path(digest)
        partial = self._partial / path.name
        with self._writing:
            file = self._files.pop(digest, None)
        with storage_errors(partial):
            if file is None:
                raise OSError(f"{digest} is not open")
            try:
                actual = _digest(file)
                if actual != digest:
                    partial.unlink()
                    raise DigestMismatchError(
                        f"all blocks fit the block map, but the whole has digest {actual}, not {digest}",
                        remedy="The bundle was packed wrong; compile it again",
                    )
                os.fchmod(file, 0o444)
                os.fsync(file)
            finally:
                os.close(file)
            partial.rename(path)
            files.flush(self._blobs)

    def put(self, digest: str, data: bytes) -> None:
        """Store a blob whose digest was checked.

        Raises:
            StorageError: the disk is full.
        """
        path = self.blob_path(digest)
        with storage_errors(path):
            files.write(path, data, mode=0o444)

    def close(self, digest: str, *, drop: bool = False) -> None:
        """Close an open blob; ``drop`` removes its partial file."""
        with self._writing:
            file = self._files.pop(digest, None)
            if file is not None:
                os.close(file)
        if drop:
            (self._partial / digests.hex_of(digest)).unlink(missing_ok=True)

    def collect(self, keep: Iterable[str]) -> None:
        """Remove every blob, partial file and map whose digest is not in ``keep``, and remains of a crash."""
        kept = {digests.hex_of(digest) for digest in keep}
        open_ = {digests.hex_of(digest) for digest in self._files}
        for folder in (self._blobs, self._maps, self._partial):
            for path in folder.iterdir():
                if path.name not in kept and path.name not in open_:
                    with contextlib.suppress(OSError):
                        path.unlink()

    def _map(self, digest: str, size: int, map_digest: str, block_map: bytes | None) -> bytes | None:
        """Return the blob's map, as given or as stored; None if none fits."""
        path = self._maps / digests.hex_of(digest)
        if block_map is not None:
            files.write(path, block_map)
            return block_map
        with contextlib.suppress(FileNotFoundError):
            stored = path.read_bytes()
            if len(stored) == block_count(size) * HASH_SIZE and digests.of_bytes(stored) == map_digest:
                return stored
        return None

    def _copy(self, name: str, file: int, size: int, hashes: bytes, have: bytearray) -> None:
        """Copy blocks that another blob of this device, or another place in this one, already holds."""
        wanted: dict[bytes, list[int]] = {}
        for index in range(block_count(size)):
            if not bit_is_set(have, index):
                wanted.setdefault(hashes[index * HASH_SIZE : (index + 1) * HASH_SIZE], []).append(index)
        if not wanted:
            return
        for path, known in self._known_maps():
            found = [
                (index, wanted[known[index * HASH_SIZE : (index + 1) * HASH_SIZE]])
                for index in range(len(known) // HASH_SIZE)
                if known[index * HASH_SIZE : (index + 1) * HASH_SIZE] in wanted
                and (path.name != name or bit_is_set(have, index))
            ]
            if not found:
                continue
            with path.open("rb") as source:
                for index, places in found:
                    data = os.pread(source.fileno(), BLOCK_SIZE, index * BLOCK_SIZE)
                    data = data[: block_length(size, places[0])]
                    # The source may be a partial file, or a blob that the disk damaged: its map is no promise.
                    if block_hash(data) != hashes[places[0] * HASH_SIZE : (places[0] + 1) * HASH_SIZE]:
                        continue
                    for place in places:
                        if not bit_is_set(have, place):
                            _write(file, data, place * BLOCK_SIZE)
                            have[place >> 3] |= 1 << (place & 7)

    def _known_maps(self) -> Iterator[tuple[Path, bytes]]:
        for path in sorted(self._maps.iterdir()):
            for holder in (self._blobs / path.name, self._partial / path.name):
                if holder.is_file():
                    yield holder, path.read_bytes()
                    break


def _write(file: int, data: bytes | memoryview, offset: int) -> None:
    """Write all bytes: the system may take fewer at a time (a full disk, a signal)."""
    left = memoryview(data)
    while left:
        written = os.pwrite(file, left, offset)
        if written == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left, offset = left[written:], offset + written


def _finished(file: int, size: int, hashes: bytes) -> bytearray:
    """Return a bitmap of the blocks whose hash matches the map. Holes of the file are not read: they are zeros, which
    completes a block of zeros."""
    count = block_count(size)
    have = bytearray((count + 7) // 8)
    zeros = {length: block_hash(bytes(length)) for length in {BLOCK_SIZE, block_length(size, count - 1)}}
    index = 0
    while index < count:
        data_at = _next_data(file, index * BLOCK_SIZE, size) // BLOCK_SIZE
        for place in range(index, min(data_at + 1, count)):
            length = block_length(size, place)
            hole = place < data_at
            actual = zeros[length] if hole else block_hash(os.pread(file, length, place * BLOCK_SIZE))
            if actual == hashes[place * HASH_SIZE : (place + 1) * HASH_SIZE]:
                have[place >> 3] |= 1 << (place & 7)
        index = data_at + 1
    return have


def _next_data(file: int, offset: int, size: int) -> int:
    """Return the offset of the next written byte from ``offset`` on; beyond ``size`` if there is none."""
    try:
        return os.lseek(file, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return size + BLOCK_SIZE
        raise


def _digest(file: int) -> str:
    offsets = itertools.count(step=_CHUNK)
    return digests.of_chunks(iter(lambda: os.pread(file, _CHUNK, next(offsets)), b""))
