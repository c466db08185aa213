"""Decides whose block comes next: devices take turns, however much each of them requests."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from dataclasses import dataclass, field

from kedge_protocol.messages import BlobKind

MAX_WAITING = 256
"""Largest number of queued blocks per device; a device that requests more is told that the controller is busy."""

BlockKey = tuple[str, BlobKind, int]
"""Digest, kind, index."""


@dataclass(frozen=True)
class Job:
    """One block to send. ``asked`` counts requests; a higher number is newer."""

    device: str
    rid: str
    digest: str
    kind: BlobKind
    index: int
    asked: int


@dataclass
class _DeviceQueue:
    """The jobs of one device in the order of its requests, and for each blob what the newest request says the device
    has."""

    boot_id: str
    jobs: OrderedDict[BlockKey, Job] = field(default_factory=OrderedDict)
    have: dict[tuple[str, BlobKind], tuple[int, int]] = field(default_factory=dict)


class FairQueue:
    """The queue between the connection's thread, which adds requests, and the sender, which takes jobs."""

    def __init__(self) -> None:
        self._lines: dict[str, _DeviceQueue] = {}
        self._order: deque[str] = deque()
        self._asked = 0
        self._filled = threading.Condition()

    def ask(
        self, device: str, rid: str, boot_id: str, digest: str, kind: BlobKind, indices: list[int], have: int
    ) -> list[int]:
        """Put blocks in the device's line. A block that waits there already is not put twice, but answered under the
        newer ``rid``; one that the device now says it has is not sent any more; a new boot of the device empties its
        line, for it asks again.

        Args:
            have: bitmap of blocks that the device says it has.

        Returns:
            Indices that found no room.
        """
        with self._filled:
            self._asked += 1
            line = self._lines.get(device)
            if line is None or line.boot_id != boot_id:
                line = self._lines[device] = _DeviceQueue(boot_id)
            line.have[digest, kind] = (self._asked, have)
            refused = []
            for index in indices:
                key = (digest, kind, index)
                if key not in line.jobs and len(line.jobs) >= MAX_WAITING:
                    refused.append(index)
                    continue
                line.jobs[key] = Job(device, rid, digest, kind, index, self._asked)
            if line.jobs and device not in self._order:
                self._order.append(device)
            self._filled.notify()
            return refused

    def take(self, timeout: float) -> Job | None:
        """Return the next block to send; None after ``timeout`` seconds without one."""
        with self._filled:
            if not self._order:
                self._filled.wait(timeout)
            while self._order:
                device = self._order.popleft()
                job = self._first(self._lines[device])
                if self._lines[device].jobs:
                    self._order.append(device)
                else:
                    self._lines[device].have.clear()
                if job is not None:
                    return job
            return None

    def _first(self, line: _DeviceQueue) -> Job | None:
        while line.jobs:
            (digest, kind, index), job = line.jobs.popitem(last=False)
            asked, have = line.have.get((digest, kind), (0, 0))
            if asked <= job.asked or not have >> index & 1:
                return job
        return None

    def clear(self) -> None:
        """Drop everything: devices ask again on a new connection."""
        with self._filled:
            self._lines.clear()
            self._order.clear()
