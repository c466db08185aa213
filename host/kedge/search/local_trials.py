"""Trials on this machine: as many in parallel as there are cores, each in its own worker."""

from __future__ import annotations

import contextlib
import os
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from kedge.search import trial
from kedge.search.candidate import Candidate
from kedge.search.results import Job, Outcome
from kedge_targets.target import Target
from kedge_targets.worker import Worker

_MOST = 8


class Trials(Protocol):
    """Something that runs candidates."""

    def run(self, candidates: Sequence[Candidate], folders: Sequence[Path]) -> list[Outcome]:
        """Run candidates, in parallel if possible; return the outcomes in the same order."""


class LocalTrials:
    """The workers of one target. The first exists from the start and runs single tasks.

    Args:
        first: a worker; others are made when several candidates are to be run.
        make: makes another worker of the given name.
        jobs: largest number of workers.
    """

    def __init__(
        self, target: Target, job: Job, first: Worker, make: Callable[[str], Worker], jobs: int | None
    ) -> None:
        self._target = target
        self._job = job
        self.first = first
        self._make = make
        self._size = max(1, min(_MOST, jobs or os.cpu_count() or 1))
        self._stack = contextlib.ExitStack()
        self._pool: ThreadPoolExecutor | None = None
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        self._idle.put(first)
        self._made = 1

    def run(self, candidates: Sequence[Candidate], folders: Sequence[Path]) -> list[Outcome]:
        """Run candidates; see :meth:`Trials.run`."""
        if len(candidates) == 1 or self._size == 1:
            return [self._one(*pair) for pair in zip(candidates, folders, strict=True)]
        if self._pool is None:
            # Its threads outlive the workers: a worker's child dies with the thread that started it.
            self._pool = self._stack.enter_context(ThreadPoolExecutor(max_workers=self._size))
        while self._made < min(self._size, len(candidates)):
            self._idle.put(self._stack.enter_context(self._make(f"{self._target.name}-{self._made}")))
            self._made += 1
        return list(self._pool.map(self._one, candidates, folders))

    def _one(self, candidate: Candidate, folder: Path) -> Outcome:
        worker = self._idle.get()
        try:
            return trial.run(candidate, self._target, self._job, worker.call, folder)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Stop all workers except the first, which the caller made."""
        self._stack.close()
