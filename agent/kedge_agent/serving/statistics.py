"""Counts each model's requests and their durations; each thread counts for itself, without a lock."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, fields

BUCKETS = 22
_LOWEST_BIT = 16


@dataclass(slots=True)
class Counts:
    """Sums over one thread, or over all.

    Attributes:
        answered, failed: numbers of requests; ``samples`` is the number of samples in the answered ones' batches.
        answered_ns, failed_ns: time from a request's arrival to its answer.
        queue_ns, input_ns, infer_ns, output_ns: for answered requests, time spent waiting for a thread, reading the
            tensors, running the model, writing the tensors.
        cache_hits, cache_misses: numbers of answered requests whose answer was kept from before, or was not, where
            answers are kept; ``cache_hit_ns`` and ``cache_miss_ns`` are the time of looking and of keeping.
        last_ms: Unix time of the latest request.
        buckets: histogram of ``answered_ns``, see :func:`bounds`.
    """

    answered: int = 0
    failed: int = 0
    samples: int = 0
    answered_ns: int = 0
    failed_ns: int = 0
    queue_ns: int = 0
    input_ns: int = 0
    infer_ns: int = 0
    output_ns: int = 0
    cache_hits: int = 0
    cache_hit_ns: int = 0
    cache_misses: int = 0
    cache_miss_ns: int = 0
    last_ms: int = 0
    buckets: list[int] = field(default_factory=lambda: [0] * (BUCKETS + 1))

    def record(self, *, samples: int, queue: int, input: int, infer: int, output: int) -> None:  # noqa: A002
        """Count an answered request; times in nanoseconds."""
        whole = queue + input + infer + output
        self.answered += 1
        self.samples += samples
        self.answered_ns += whole
        self.queue_ns += queue
        self.input_ns += input
        self.infer_ns += infer
        self.output_ns += output
        self.last_ms = int(time.time() * 1000)
        self.buckets[min((whole >> _LOWEST_BIT).bit_length(), BUCKETS)] += 1

    def record_hit(self, *, samples: int, queue: int, look: int) -> None:
        """Count a request whose answer was kept; times in nanoseconds."""
        self.cache_hits += 1
        self.cache_hit_ns += look
        self.record(samples=samples, queue=queue, input=look, infer=0, output=0)

    def record_miss(self, nanoseconds: int) -> None:
        """Count a request whose answer was not kept, and the time of looking for it and keeping it."""
        self.cache_misses += 1
        self.cache_miss_ns += nanoseconds

    def record_failure(self, nanoseconds: int) -> None:
        """Count a request that was answered with an error."""
        self.failed += 1
        self.failed_ns += nanoseconds
        self.last_ms = int(time.time() * 1000)


def bounds() -> list[float]:
    """Return the buckets' upper bounds in seconds: powers of two from 65.536 µs to 137 s; the last bucket has none."""
    return [(1 << (_LOWEST_BIT + number)) / 1e9 for number in range(BUCKETS)]


class _Owner:
    """Lives as long as a thread's local storage."""

    __slots__ = ("__weakref__",)


class Statistics:
    """The counters of one model."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._all: list[Counts] = []
        self._free: deque[Counts] = deque()

    def mine(self) -> Counts:
        """Return the calling thread's counts, which only that thread may write."""
        try:
            found: Counts = self._local.counts
        except AttributeError:
            found = self._claim()
        return found

    def _claim(self) -> Counts:
        """Return counts for a new thread: those of one that has ended go on from where they are."""
        try:
            counts = self._free.popleft()
        except IndexError:
            counts = Counts()
            self._all.append(counts)
        owner = _Owner()
        self._local.counts, self._local.owner = counts, owner
        weakref.finalize(owner, self._free.append, counts).atexit = False
        return counts

    def total(self) -> Counts:
        """Return the sum over all threads."""
        total = Counts()
        for counts in list(self._all):
            for item in _numbers():
                setattr(total, item, getattr(total, item) + getattr(counts, item))
            total.last_ms = max(total.last_ms, counts.last_ms)
            total.buckets = [a + b for a, b in zip(total.buckets, counts.buckets, strict=True)]
        return total


def _numbers() -> Iterator[str]:
    return (item.name for item in fields(Counts) if item.name not in ("last_ms", "buckets"))
