"""Threads that run the jobs of one model (or of another runtime), behind a bounded queue."""

from __future__ import annotations

import threading
import time
from queue import SimpleQueue
from typing import Protocol


class Task(Protocol):
    """A task that a pool runs."""

    def run(self) -> None:
        """Do the work; raises nothing."""
        ...


class Monitor(Protocol):
    """Records which calls are running, so that a runtime that takes the process down can be identified."""

    def row(self, name: str) -> memoryview:
        """Return a row for a new thread of a pool: its first byte is 1 during a call."""
        ...

    def give_back(self, row: memoryview) -> None:
        """Free the row of a thread that has ended."""
        ...

    def loading(self, under_way: bool) -> None:
        """Record whether a model is being loaded."""
        ...


class WorkerPool:
    """A pool of threads that start when there is work, and then stay.

    Args:
        name: name of the model or the runtime, for messages and metrics.
        threads: largest number of concurrent calls.
        queue_limit: largest number of waiting jobs; one more is refused.
        deadline: seconds from a request's arrival to its answer (for a stream, to its next chunk), waiting included.
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
        """Number of jobs refused because the queue was full."""
        self._monitor = monitor
        self._queue: SimpleQueue[Task | None] = SimpleQueue()
        self._starting = threading.Lock()
        self._running: dict[int, float] = {}
        self._started = 0
        self._closed = False

    def submit(self, task: Task) -> bool:
        """Queue a task; return False if the queue is full or the pool is closed."""
        if self._closed or self._queue.qsize() >= self.queue_limit:
            self.refused += 1
            return False
        self._queue.put(task)
        # With all threads there is nothing to look at; before, one more than needed may be started, and is kept.
        return self._started == self.threads or self._start_one()

    @property
    def waiting(self) -> int:
        """Return the number of jobs in the queue."""
        return self._queue.qsize()

    @property
    def running(self) -> int:
        """Return the number of running jobs."""
        return len(self._running)

    def longest_call(self, now: float) -> float:
        """Return the seconds since the oldest running job began (monotonic clock), or 0 if there is none."""
        return now - min(list(self._running.values()), default=now)

    def progressed(self) -> None:
        """Restart the clock of the calling thread's job, since it makes progress (a stream has yielded a chunk)."""
        mine = threading.get_ident()
        if mine in self._running:
            self._running[mine] = time.monotonic()

    def close(self) -> None:
        """Accept no more jobs; those in the queue are still done, then the threads end."""
        with self._starting:
            self._closed = True
            for _ in range(self._started):
                self._queue.put(None)

    def _start_one(self) -> bool:
        """Start a thread if none is free; return False if there is no thread and none can be started."""
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
