"""Threads that run the jobs of one model (or of another runtime), behind a bounded queue."""

from __future__ import annotations

import threading
import time
from queue import SimpleQueue
from typing import Protocol

_LONGEST_HERE = 0.002
"""Usual seconds of a call up to which it runs in the event loop's thread."""


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
        in_loop: whether calls may run in the event loop's thread as long as they are short, see :meth:`takes_here`.
    """

    def __init__(
        self,
        name: str,
        *,
        threads: int = 1,
        queue_limit: int = 64,
        deadline: float = 30.0,
        monitor: Monitor | None = None,
        in_loop: bool = False,
    ) -> None:
        self.name = name
        self.threads = threads
        self.deadline = deadline
        self.queue_limit = queue_limit
        self.gathers = False
        """Whether calls that wait are run together: then each waits in a thread of its own, none in the event loop."""
        self.refused = 0
        """Number of jobs refused because the queue was full."""
        self._monitor = monitor
        self._queue: SimpleQueue[Task | None] = SimpleQueue()
        self._starting = threading.Lock()
        self._running: dict[int, float] = {}
        self._started = 0
        self._closed = False
        self._in_loop = in_loop
        self._here: memoryview | None = None
        self._here_waiting = 0
        self._is_here = False
        self._held: list[Task] = []
        self._seconds = 0.0
        """Usual duration of a call. One that is longer weighs an eighth, as on a busy machine it may have waited for
        the processor; one that is shorter tells the truth."""

    def submit(self, task: Task) -> bool:
        """Queue a task; return False if the queue is full or the pool is closed."""
        if self._closed or self.waiting >= self.queue_limit:
            self.refused += 1
            return False
        if self._is_held_back(task):
            return True
        self._queue.put(task)
        # With all threads there is nothing to look at; before, one more than needed may be started, and is kept.
        return self._started == self.threads or self._start_one()

    def takes_here(self) -> bool:
        """Return whether the event loop's thread may run the next call itself, at :meth:`run_here`: calls are short and
        by themselves, no thread has one, and there is room in the queue. If so, it counts as waiting."""
        if not self._in_loop or self.gathers or self._seconds > _LONGEST_HERE:
            return False
        if self._running or self._queue.qsize():
            return False
        if self._closed or self._here_waiting > self.queue_limit:
            return False
        self._here_waiting += 1
        return True

    def run_here(self, task: Task) -> None:
        """Run a task in this thread; if meanwhile another call runs, queue it."""
        self._here_waiting -= 1
        if self._running:
            if not self._is_held_back(task):
                self._queue.put(task)
                self._start_one()
            return
        if self._here is None:
            self._here = memoryview(bytearray(1)) if self._monitor is None else self._monitor.row(self.name)
        self._is_here = True
        try:
            self._timed(task, threading.get_ident(), self._here)
        finally:
            self._release_held()

    def _is_held_back(self, task: Task) -> bool:
        """Keep a task back while the event loop's thread has the only call that may run; return whether it is kept."""
        if not self._is_here or self.threads > 1:
            return False
        with self._starting:
            if self._is_here:
                self._held.append(task)
            return self._is_here

    def _release_held(self) -> None:
        with self._starting:
            self._is_here = False
            held, self._held = self._held, []
            for task in held:
                self._queue.put(task)
        if held:
            self._start_one()
            if self._closed:
                self._queue.put(None)

    def _timed(self, task: Task, mine: int, row: memoryview) -> None:
        begun = self._running[mine] = time.monotonic()
        row[0] = 1
        try:
            task.run()
        finally:
            row[0] = 0
            del self._running[mine]
            took = min(time.monotonic() - begun, 1.0)
            self._seconds = took if took < self._seconds else self._seconds + (took - self._seconds) / 8

    @property
    def waiting(self) -> int:
        """Return the number of jobs in the queue."""
        # The first of those that the loop will run does not wait for another call.
        here = self._here_waiting - (not self._running)
        return self._queue.qsize() + max(here, 0) + len(self._held)

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
        monitor, mine = self._monitor, threading.get_ident()
        row = memoryview(bytearray(1)) if monitor is None else monitor.row(self.name)
        try:
            while (task := self._queue.get()) is not None:
                self._timed(task, mine, row)
        finally:
            if monitor is not None:
                monitor.give_back(row)
