"""Threads that run the jobs of one model (or of one other runtime), with a bounded queue before them."""

from __future__ import annotations

import threading
import time
from collections import deque
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
        self._queue: deque[Task] = deque()
        self._work_there = threading.Condition(threading.Lock())
        self._idle = 0
        self._running: dict[int, float] = {}
        self._started = 0
        self._closed = False

    def submit(self, task: Task) -> bool:
        """Queue a task; False where the queue is full or the pool is closed."""
        with self._work_there:
            if self._closed or len(self._queue) >= self.queue_limit:
                self.refused += 1
                return False
            self._queue.append(task)
            if self._idle:
                # Counted here, not by the thread when it wakes: the next task must not count on the same one.
                self._idle -= 1
                self._work_there.notify()
            elif self._started < self.threads:
                self._started += 1
                try:
                    threading.Thread(target=self._work, name=f"kedge-{self.name}", daemon=True).start()
                except RuntimeError:
                    # No thread to be had: those that run will come to it, if there are any.
                    self._started -= 1
                    if not self._started:
                        self._queue.pop()
                        return False
        return True

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        return len(self._queue)

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
        with self._work_there:
            self._closed = True
            self._work_there.notify_all()

    def _work(self) -> None:
        monitor = self._monitor
        row = memoryview(bytearray(1)) if monitor is None else monitor.row(self.name)
        try:
            while (task := self._next()) is not None:
                self._running[threading.get_ident()] = time.monotonic()
                row[0] = 1
                try:
                    task.run()
                finally:
                    row[0] = 0
                    del self._running[threading.get_ident()]
        finally:
            if monitor is not None:
                monitor.give_back(row)

    def _next(self) -> Task | None:
        """Wait for a task; None where there will be no more."""
        with self._work_there:
            while not self._queue:
                if self._closed:
                    self._started -= 1
                    return None
                self._idle += 1
                self._work_there.wait()
            return self._queue.popleft()
