"""Threads that run the jobs of one model (or of one other runtime), with a bounded queue before them."""

from __future__ import annotations

import threading
import time
from queue import SimpleQueue
from typing import Protocol


class Task(Protocol):
    """What a pool runs."""

    def run(self) -> None:
        """Do the work; nothing is raised."""
        ...


class Monitor(Protocol):
    """Keeps which calls run, so that a runtime that takes the process down can be named."""

    def row(self, name: str) -> memoryview:
        """A row for a new thread of a pool: its first byte is 1 during a call."""
        ...

    def give_back(self, row: memoryview) -> None:
        """The thread has ended."""
        ...

    def loading(self, under_way: bool) -> None:
        """A model is being loaded, or no longer."""
        ...


class WorkerPool:
    """Threads that are started when there is work for them, and then stay.

    Args:
        name: of the model or the runtime, for messages and metrics.
        threads: calls at once.
        queue_limit: jobs that wait; one more is refused.
        deadline: seconds from a request's arrival to its answer (of a stream: to its next chunk), waiting included.
    """

    def __init__(
        self,
        name: str,
        *,
        threads: int = 1,
        queue_limit: int = 64,
        deadline: float = 30.0,
        monitor: Monitor | None = None,
    ) -> None:
        self.name = name
        self.threads = threads
        self.deadline = deadline
        self.queue_limit = queue_limit
        self.refused = 0
        """Jobs for which the queue had no place."""
        self._monitor = monitor
        self._queue: SimpleQueue[Task | None] = SimpleQueue()
        self._starting = threading.Lock()
        self._running: dict[int, float] = {}
        self._started = 0
        self._closed = False

    def submit(self, task: Task) -> bool:
        """Queue a task; False where the queue is full or the pool is closed."""
        if self._closed or self._queue.qsize() >= self.queue_limit:
            self.refused += 1
            return False
        self._queue.put(task)
        # With all threads there is nothing to look at; before, one more than needed may be started, and is kept.
        return self._started == self.threads or self._start_one()

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        return self._queue.qsize()

    @property
    def running(self) -> int:
        """Jobs under way."""
        return len(self._running)

    def longest_call(self, now: float) -> float:
        """Seconds since the oldest job under way began (steady clock); 0 where none is."""
        return now - min(list(self._running.values()), default=now)

    def progressed(self) -> None:
        """The job of the calling thread goes on well (a stream has given a chunk): it counts as begun just now."""
        mine = threading.get_ident()
        if mine in self._running:
            self._running[mine] = time.monotonic()

    def close(self) -> None:
        """Take no more jobs; those in the queue are done still, then the threads end."""
        with self._starting:
            self._closed = True
            for _ in range(self._started):
                self._queue.put(None)

    def _start_one(self) -> bool:
        """Start a thread if none is free; False where there is no thread at all, and none to be had."""
        with self._starting:
            if self._started < self.threads and self._queue.qsize() > self._started - len(self._running):
                try:
                    threading.Thread(target=self._work, name=f"kedge-{self.name}", daemon=True).start()
                    self._started += 1
                except RuntimeError:
                    return self._started > 0
        return True

    def _work(self) -> None:
        monitor, mine, running = self._monitor, threading.get_ident(), self._running
        row = memoryview(bytearray(1)) if monitor is None else monitor.row(self.name)
        try:
            while (task := self._queue.get()) is not None:
                running[mine] = time.monotonic()
                row[0] = 1
                try:
                    task.run()
                finally:
                    row[0] = 0
                    del running[mine]
        finally:
            if monitor is not None:
                monitor.give_back(row)
