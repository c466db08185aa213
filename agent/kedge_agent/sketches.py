"""Counts of drift sketches: each process that uses a model writes to a mapped file, and the agent adds what is new.

::

    models/NAME/sketches/PID-NONCE   header (one page), then one unsigned 64-bit count for each bin of each stream, and
                                     those of :func:`kedge_protocol.drift.repeat_effect`

As with :mod:`kedge_agent.counters`, a file serves one bundle and is locked while its writer lives. Its counts are only
of use as they come in: what a file gained before the agent's start belongs to no interval, and a file whose writer is
gone is removed once it was read. Threads, and processes after a fork, share the counts without a lock: one lost now and
then does not matter. This module does not use numpy, which the resident agent does not load.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import secrets
import stat
import struct
from collections.abc import Sequence
from pathlib import Path

from kedge_protocol import drift, files
from kedge_protocol.drift import Stream

log = logging.getLogger("kedge.sketches")

_MAGIC = b"KDGSKT01"
_HEADER = struct.Struct("=8sI71s")
"""Magic, number of counts, digest."""
_HEADER_SIZE = mmap.ALLOCATIONGRANULARITY
_MAX_FILES = 256


class Sketch:
    """This process's counts of one bundle.

    Args:
        folder: ``models/NAME/sketches``.
        digest: digest of the bundle.
        streams: its baseline.

    Raises:
        OSError: the folder is missing or not writable.
    """

    def __init__(self, folder: Path, *, digest: str, streams: Sequence[Stream]) -> None:
        size = sum(len(stream.counts) for stream in streams) + drift.REPEAT_BITS + 1
        name = f"{os.getpid()}-{secrets.token_hex(6)}"
        staged = folder / f".{name}"
        self._file = os.open(staged, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            os.fchmod(self._file, 0o644)
            files.try_lock(self._file)
            os.pwrite(self._file, _HEADER.pack(_MAGIC, size, digest.encode()), 0)
            # Real blocks: a full disk is an error here, not a SIGBUS in a call.
            os.posix_fallocate(self._file, _HEADER_SIZE, size * 8)
            mapped = mmap.mmap(self._file, size * 8, offset=_HEADER_SIZE)
            self._counts = memoryview(mapped).cast("Q")
            staged.rename(folder / name)
        except BaseException:
            os.close(self._file)
            with contextlib.suppress(OSError):
                staged.unlink()
            raise
        self._streams = streams
        starts = [0]
        for stream in streams:
            starts.append(starts[-1] + len(stream.counts))
        self._starts = starts

    def add(self, number: int, value: float) -> None:
        """Count one sample's value in stream ``number``; one that is not finite is left out."""
        place = self._streams[number].bin_of(value)
        if place is not None:
            self._counts[self._starts[number] + place] += 1

    def add_sample(self, digest: bytes) -> None:
        """Count one sample by a hash of its inputs."""
        start = self._starts[-1]
        self._counts[start] += 1
        for place in drift.repeat_bits(digest):
            self._counts[start + 1 + place] += 1

    def close(self) -> None:
        """Mark the file as final."""
        if self._file >= 0:
            files.unlock(self._file)
            os.close(self._file)
            self._file = -1


class SketchReader:
    """Adds what all processes count of one model.

    Args:
        folder: ``models/NAME/sketches``; it need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: dict[str, tuple[int, ...]] = {}
        self._fresh: dict[str, list[int]] = {}
        """Digest → counts since they were last taken."""
        for name in self._names():
            self._look_at(name)
        self._fresh.clear()

    def look(self) -> None:
        """Add what is new, and remove the files of ended processes."""
        names = self._names()
        for name in names:
            self._look_at(name)
        self._seen = {name: counts for name, counts in self._seen.items() if name in names}

    def take(self, digest: str, streams: Sequence[Stream]) -> dict[str, tuple[int, ...]]:
        """Return the counts of a bundle since the last call, by the streams' names; those without any are left out.
        What was counted of other bundles meanwhile is dropped."""
        self.look()
        counts = self._fresh.get(digest, [])
        self._fresh.clear()
        sizes = [(stream.name, len(stream.counts)) for stream in streams]
        sizes.append((drift.REPEATS, drift.REPEAT_BITS + 1))
        if not streams or len(counts) != sum(size for _, size in sizes):
            return {}
        found, at = {}, 0
        for name, size in sizes:
            part = tuple(counts[at : at + size])
            at += size
            if any(part):
                found[name] = part
        return found

    def _names(self) -> list[str]:
        try:
            names = sorted(entry.name for entry in os.scandir(self._folder) if not entry.name.startswith("."))
        except OSError:
            return []
        return names[:_MAX_FILES]

    def _look_at(self, name: str) -> None:
        path = self._folder / name
        try:
            file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                return
            # Asked before it is read: once the writer is gone, what is read is all there will be.
            ended = files.try_lock(file, shared=True)
            read = _read(file)
        except OSError:
            return
        finally:
            os.close(file)
        if read is not None:
            digest, counts = read
            before = self._seen.get(name, (0,) * len(counts))
            new = [max(0, b - a) for a, b in zip(before, counts, strict=True)]
            known = self._fresh.setdefault(digest, [0] * len(counts))
            if len(known) == len(new):
                self._fresh[digest] = [a + b for a, b in zip(known, new, strict=True)]
            self._seen[name] = counts
        if ended:
            self._seen.pop(name, None)
            with contextlib.suppress(OSError):
                path.unlink()


def _read(file: int) -> tuple[str, tuple[int, ...]] | None:
    header = os.pread(file, _HEADER.size, 0)
    if len(header) != _HEADER.size:
        return None
    magic, size, name = _HEADER.unpack(header)
    if magic != _MAGIC or not 0 < size <= (drift.MAX_STREAMS + 1) * drift.MAX_BINS:
        return None
    raw = os.pread(file, size * 8, _HEADER_SIZE)
    if len(raw) != size * 8:
        return None
    return name.decode("ascii", errors="replace"), tuple(memoryview(raw).cast("Q"))
