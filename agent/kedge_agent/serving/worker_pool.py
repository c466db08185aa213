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
    """Is told which call runs, so that a runtime that takes the process down can be named."""

    def begin(self, pool: str) -> None:
        """A call of this pool begins."""
        ...

    def end(self, pool: str) -> None:
        """A call of this pool has ended."""
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

    def close(self) -> None:
        """Take no more jobs; those in the queue are done still, then the threads end."""
        with self._work_there:
            self._closed = True
            self._work_there.notify_all()

    def _work(self) -> None:
        mine = threading.get_ident()
        monitor, name = self._monitor, self.name
        while True:
            with self._work_there:
                while not self._queue:
                    if self._closed:
                        self._started -= 1
                        return
                    self._idle += 1
                    self._work_there.wait()
                task = self._queue.popleft()
            self._running[mine] = time.monotonic()
            if monitor is not None:
                monitor.begin(name)
            try:
                task.run()
            finally:
                if monitor is not None:
                    monitor.end(name)
                del self._running[mine]
