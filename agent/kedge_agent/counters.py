"""Counts calls: each process that uses a model writes to a mapped file, and the agent sums the files.

::

    models/NAME/counters/PID-NONCE   header (one page), then rows of 2048 bytes, one a thread
    models/NAME/counters/totals      JSON: the sum of files whose processes are gone

A row has one writer, so a call takes no lock. A file serves one bundle: after a switch a process opens a new one. While
its writer lives, the file is locked (``flock``); the kernel releases the lock however the process ends, and whatever
its number or namespace is, so a reused process number is never mistaken for the writer.

Latencies are counted in the buckets of :mod:`kedge_protocol.latency_buckets`. This module does not use numpy, which the
resident agent does not load.
"""

from __future__ import annotations

import contextlib
import json
import logging
import mmap
import os
import secrets
import stat
import struct
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kedge_protocol import files, latency_buckets
from kedge_protocol.digest import checked
from kedge_protocol.errors import BundleError
from kedge_protocol.latency_buckets import BUCKETS

log = logging.getLogger("kedge.counters")

TOTALS_FILE = "totals"

_MAGIC = b"KDGCNT01"
_HEADER = struct.Struct("=8sIIQ71s")
"""Magic, process number, size of a row, the model's generation, digest."""
_HEADER_SIZE = mmap.ALLOCATIONGRANULARITY
_ROW_SIZE = 2048
_CHUNK_SIZE = max(1 << 16, mmap.ALLOCATIONGRANULARITY)
_ROWS_A_CHUNK = _CHUNK_SIZE // _ROW_SIZE
_MAX_ROWS = 4096
_MAX_FILES = 1024
_KEPT_DIGESTS = 16

# Fields of a row, unsigned 64-bit integers of the machine.
_INFERENCES, _ERRORS, _NANOSECONDS, _BUCKETS = 0, 1, 2, 3
_LOWEST_BIT, _HIGHEST_BIT = latency_buckets.LOWEST_BIT, latency_buckets.HIGHEST_BIT
_FIELDS = _BUCKETS + BUCKETS
_LAST = _BUCKETS + BUCKETS - 1


class Counter:
    """This process's counts of one bundle.

    Args:
        folder: ``models/NAME/counters``.
        digest: digest of the bundle.
        generation: the model's generation when the bundle was loaded.

    Raises:
        OSError: the folder is missing or not writable.
    """

    def __init__(self, folder: Path, *, digest: str, generation: int) -> None:
        self._folder = folder
        self._digest = digest
        self._generation = generation
        self._claiming = threading.Lock()
        self._file = -1
        self._open()
        _counters.add(self)

    def record(self, nanoseconds: int) -> None:
        """Count one inference that took this long."""
        try:
            row = self._local.row
        except AttributeError:
            row = self._claim()
        row[_INFERENCES] += 1
        row[_NANOSECONDS] += nanoseconds
        bits = nanoseconds.bit_length()
        if bits <= _LOWEST_BIT:
            row[_BUCKETS] += 1
        elif bits <= _HIGHEST_BIT:
            row[((bits - _LOWEST_BIT) << 3) + (nanoseconds >> (bits - 4)) - 12] += 1
        else:
            row[_LAST] += 1

    def error(self) -> None:
        """Count one call that failed."""
        try:
            row = self._local.row
        except AttributeError:
            row = self._claim()
        row[_ERRORS] += 1

    def close(self) -> None:
        """Mark the file as final; the agent then folds it into the totals."""
        _counters.discard(self)
        if self._file >= 0:
            files.unlock(self._file)
            os.close(self._file)
            self._file = -1

    def _open(self) -> None:
        self._local = threading.local()
        self._free: list[memoryview] = []
        self._rows = 0
        name = f"{os.getpid()}-{secrets.token_hex(6)}"
        # Under a hidden name until it is locked and has a header: the agent never sees half a file.
        staged = self._folder / f".{name}"
        self._file = os.open(staged, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            os.fchmod(self._file, 0o644)
            files.try_lock(self._file)
            header = _HEADER.pack(_MAGIC, os.getpid(), _ROW_SIZE, self._generation, self._digest.encode())
            os.pwrite(self._file, header, 0)
            self._grow()
            staged.rename(self._folder / name)
        except BaseException:
            os.close(self._file)
            self._file = -1
            with contextlib.suppress(OSError):
                staged.unlink()
            raise

    def _grow(self) -> None:
        offset = _HEADER_SIZE + self._rows * _ROW_SIZE
        # Real blocks: a full disk is an error here, not a SIGBUS in a call.
        os.posix_fallocate(self._file, offset, _CHUNK_SIZE)
        chunk = memoryview(mmap.mmap(self._file, _CHUNK_SIZE, offset=offset))
        for start in range(0, _CHUNK_SIZE, _ROW_SIZE):
            self._free.append(chunk[start : start + _FIELDS * 8].cast("Q"))
        self._rows += _ROWS_A_CHUNK

    def _claim(self) -> memoryview:
        with self._claiming:
            if not self._free and self._rows < _MAX_ROWS and self._file >= 0:
                with contextlib.suppress(OSError):
                    self._grow()
            # With no row to be had the call still works, it only is not counted.
            row = self._free.pop(0) if self._free else memoryview(bytearray(_FIELDS * 8)).cast("Q")
        owner = _Owner()
        self._local.row, self._local.owner = row, owner
        # When the thread ends its row goes to the next one; sums go on from where they are.
        weakref.finalize(owner, self._free.append, row).atexit = False
        return row

    def _after_fork(self) -> None:
        # The parent goes on with the file and its lock; closing our copy of the descriptor lifts nothing.
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._claiming = threading.Lock()
        try:
            self._open()
        except OSError:
            self._local = threading.local()
            self._free, self._rows = [], _MAX_ROWS


class _Owner:
    """Lives as long as a thread's local storage."""

    __slots__ = ("__weakref__",)


_counters: weakref.WeakSet[Counter] = weakref.WeakSet()


def _after_fork() -> None:
    for counter in list(_counters):
        counter._after_fork()


os.register_at_fork(after_in_child=_after_fork)

_warned: set[Path] = set()


def open_counter(folder: Path, *, digest: str, generation: int) -> Counter | None:
    """Open a counter; None if this process may not write to the folder, which is logged once."""
    try:
        return Counter(folder, digest=digest, generation=generation)
    except OSError as error:
        if folder not in _warned:
            _warned.add(folder)
            log.warning("calls are not counted: %s: %s", folder, error.strerror or error)
        return None


@dataclass(frozen=True)
class Totals:
    """Sums over processes and threads.

    Attributes:
        inferences: number of calls that returned a result.
        errors: number of calls that failed.
        nanoseconds: time spent in ``inferences``.
        buckets: counts of the latency histogram.
        digests: bundle digest → inferences, for the latest bundles only.
    """

    inferences: int = 0
    errors: int = 0
    nanoseconds: int = 0
    buckets: tuple[int, ...] = (0,) * BUCKETS
    digests: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: Totals) -> Totals:
        return self._with(other, lambda a, b: a + b)

    def __sub__(self, earlier: Totals) -> Totals:
        """Return the counts since ``earlier``, never below zero, since counts may have been reset."""
        return self._with(earlier, lambda a, b: max(0, a - b))

    def _with(self, other: Totals, join: Callable[[int, int], int]) -> Totals:
        names = [*self.digests, *(name for name in other.digests if name not in self.digests)]
        return Totals(
            join(self.inferences, other.inferences),
            join(self.errors, other.errors),
            join(self.nanoseconds, other.nanoseconds),
            tuple(map(join, self.buckets, other.buckets)),
            {name: join(self.digests.get(name, 0), other.digests.get(name, 0)) for name in names},
        )

    def percentile_ms(self, share: float) -> float:
        """Return the latency in milliseconds that ``share`` (0..1) of the inferences did not exceed, within about 6 %;
        0.0 without inferences."""
        return latency_buckets.percentile_ms(self.buckets, share)

    @property
    def mean_ms(self) -> float:
        """Return the mean latency in milliseconds; 0.0 without inferences."""
        return self.nanoseconds / self.inferences / 1e6 if self.inferences else 0.0

    def latency_ms(self) -> dict[str, float]:
        """Return ``p50``, ``p95``, ``p99`` and ``mean`` in milliseconds; empty without inferences."""
        if not self.inferences:
            return {}
        shares = {"p50": 0.50, "p95": 0.95, "p99": 0.99}
        return {**{name: self.percentile_ms(share) for name, share in shares.items()}, "mean": self.mean_ms}


def collect(folder: Path, *, fold: bool = True) -> Totals:
    """Sum all counts of a model since it was installed.

    Files of ended processes are folded into ``totals`` and removed. Files that are incomplete, foreign or not counters
    are skipped; links are never followed.

    Args:
        folder: ``models/NAME/counters``; it need not exist.
        fold: whether to fold files; False only reads, for callers other than the agent.
    """
    kept, folded = _read_totals(folder / TOTALS_FILE)
    total = kept
    gone: dict[str, Totals] = {}
    for name in _names(folder):
        with _opened(folder / name) as file:
            if file is None or name in folded:
                continue
            # Asked before it is read: once the writer is gone, what is read is all there will be.
            ended = _has_ended(file)
            counts = _read_counts(file)
            if counts is None:
                continue
            total += counts
            if ended:
                gone[name] = counts
    if fold and (gone or folded):
        for counts in gone.values():
            kept += counts
        # A crash before the last step leaves files that `totals` names: they are not counted again.
        _fold(folder, kept, (folded & set(_names(folder))) | set(gone))
    return total


def _names(folder: Path) -> list[str]:
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    except OSError:
        return []
    return [name for name in names if name != TOTALS_FILE][:_MAX_FILES]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int | None]:
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        yield None
        return
    try:
        yield file if stat.S_ISREG(os.fstat(file).st_mode) else None
    finally:
        os.close(file)


def _has_ended(file: int) -> bool:
    try:
        return files.try_lock(file, shared=True)
    except OSError:
        return False


def _read_counts(file: int) -> Totals | None:
    header = os.pread(file, _HEADER.size, 0)
    if len(header) != _HEADER.size:
        return None
    magic, _, row_size, _, name = _HEADER.unpack(header)
    try:
        bundle = checked(name.decode("ascii"))
    except (UnicodeDecodeError, BundleError):
        return None
    if magic != _MAGIC or row_size != _ROW_SIZE:
        return None
    rows = min((os.fstat(file).st_size - _HEADER_SIZE) // _ROW_SIZE, _MAX_ROWS)
    sums = [0] * _FIELDS
    body = os.pread(file, max(0, rows) * _ROW_SIZE, _HEADER_SIZE)
    for offset in range(0, len(body), _ROW_SIZE):
        if any(body[offset : offset + 8 * _NANOSECONDS]):
            row = _read_row(file, _HEADER_SIZE + offset)
            sums = [a + b for a, b in zip(sums, row, strict=True)]
    inferences = sums[_INFERENCES]
    return Totals(inferences, sums[_ERRORS], sums[_NANOSECONDS], tuple(sums[_BUCKETS:]), {bundle: inferences})


def _read_row(file: int, offset: int) -> memoryview:
    # On 32-bit processors a field is written in two halves: only what was read twice alike is believed, if it can be.
    raw = os.pread(file, _FIELDS * 8, offset)
    for _ in range(4):
        again = os.pread(file, _FIELDS * 8, offset)
        if raw == again:
            break
        raw = again
    return memoryview(raw.ljust(_FIELDS * 8, b"\0")).cast("Q")


def _read_totals(path: Path) -> tuple[Totals, set[str]]:
    with _opened(path) as file:
        # The folder is open to all users: only our own file is the sum.
        if file is None or os.fstat(file).st_uid not in (os.geteuid(), path.parent.stat().st_uid):
            return Totals(), set()
        raw = os.pread(file, 1 << 20, 0)
    try:
        data = json.loads(raw)
        buckets = tuple(int(count) for count in data["buckets"])
        digests = {str(name): int(count) for name, count in data["digests"].items()}
        totals = Totals(int(data["inferences"]), int(data["errors"]), int(data["nanoseconds"]), buckets, digests)
        folded = {str(name) for name in data["folded"]}
    except (ValueError, KeyError, TypeError, AttributeError):
        return Totals(), set()
    return (totals, folded) if len(buckets) == BUCKETS else (Totals(), set())


def _fold(folder: Path, kept: Totals, folded: set[str]) -> None:
    document = {
        "inferences": kept.inferences,
        "errors": kept.errors,
        "nanoseconds": kept.nanoseconds,
        "buckets": kept.buckets,
        "digests": dict(list(kept.digests.items())[-_KEPT_DIGESTS:]),
        "folded": sorted(folded),
    }
    try:
        files.write(folder / TOTALS_FILE, json.dumps(document).encode())
    except OSError as error:
        log.warning("counts cannot be folded: %s: %s", folder, error.strerror or error)
        return
    for name in (*folded, *_leftovers(folder)):
        with contextlib.suppress(OSError):
            (folder / name).unlink()


def _leftovers(folder: Path) -> list[str]:
    """Return the hidden files of writers that were killed before their file was ready."""
    with contextlib.suppress(OSError):
        before = time.time() - 3600
        hidden = [entry for entry in os.scandir(folder) if entry.name.startswith(".")]
        return [entry.name for entry in hidden if entry.stat(follow_symlinks=False).st_mtime < before]
    return []
