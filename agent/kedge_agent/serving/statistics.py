"""How many requests each model answered and how long that took, counted without a lock by each thread for itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields

BUCKETS = 22
_LOWEST_BIT = 16


@dataclass(slots=True)
class Counts:
    """Sums of one thread, or of all.

    Attributes:
        answered, failed: requests; ``samples`` are those in the answered ones' batches.
        answered_ns, failed_ns: from a request's arrival to its answer.
        queue_ns, input_ns, infer_ns, output_ns: of answered requests: waiting for a thread, reading the tensors, the
            model, writing the tensors.
        last_ms: Unix time of the latest request.
        buckets: of ``answered_ns``, see :func:`bounds`.
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
    last_ms: int = 0
    buckets: list[int] = field(default_factory=lambda: [0] * (BUCKETS + 1))

    def record(self, *, samples: int, queue: int, input: int, infer: int, output: int) -> None:  # noqa: A002
        """Count an answered request; nanoseconds."""
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

    def record_failure(self, nanoseconds: int) -> None:
        """Count a request that was answered by an error."""
        self.failed += 1
        self.failed_ns += nanoseconds
        self.last_ms = int(time.time() * 1000)


def bounds() -> list[float]:
    """Upper bounds of the buckets, seconds: powers of two from 65.536 µs to 137 s; the last bucket has none."""
    return [(1 << (_LOWEST_BIT + number)) / 1e9 for number in range(BUCKETS)]


class Statistics:
    """Counts of one model."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._all: list[Counts] = []

    def mine(self) -> Counts:
        """The calling thread's counts, to be written by it alone."""
        try:
            found: Counts = self._local.counts
        except AttributeError:
            found = self._local.counts = Counts()
            self._all.append(found)
        return found

    def total(self) -> Counts:
        """The sum of all threads' counts."""
        total = Counts()
        for counts in list(self._all):
            for item in _numbers():
                setattr(total, item, getattr(total, item) + getattr(counts, item))
            total.last_ms = max(total.last_ms, counts.last_ms)
            total.buckets = [a + b for a, b in zip(total.buckets, counts.buckets, strict=True)]
        return total


def _numbers() -> Iterator[str]:
    return (item.name for item in fields(Counts) if item.name not in ("last_ms", "buckets"))
