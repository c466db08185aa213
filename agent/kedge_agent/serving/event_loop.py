"""One thread for all connections: waits for sockets (epoll), for calls from other threads, and for the clock.

``asyncio`` would do the same but take 6 MiB of memory; an agent with a model has 60.

Short calls of a model run in this thread too: handing one to another thread and back costs more than the call. If one
turns out to be long, another thread goes on with the loop, and the first one ends after its call.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable

log = logging.getLogger("kedge.serving")

READ, WRITE = select.EPOLLIN, select.EPOLLOUT
FAILED = select.EPOLLHUP | select.EPOLLERR
"""The peer has closed both directions."""
_MAX_EVENTS = 256
PATIENCE = 0.005
"""Seconds that a task may keep the loop waiting before another thread goes on with it, at least; twice that at most."""
_REST_AFTER = 200
"""Rounds without a task after which the watching thread sleeps until the next one."""


class EventLoop:
    """An event loop that runs callbacks in one thread.

    Args:
        tick: called every ``period`` seconds with the monotonic time, for deadlines and the heartbeat.
    """

    def __init__(self, tick: Callable[[float], None], *, period: float = 0.2) -> None:
        self._tick = tick
        self._period = period
        self._epoll = select.epoll()
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wakeup, READ)
        self._handlers: dict[int, Callable[[int], None]] = {self._wakeup: self._drain_wakeup}
        self._calls: deque[Callable[[], None]] = deque()
        self._tasks: deque[Callable[[], None]] = deque()
        self._stopping = False
        self._done = threading.Event()
        self._lease = threading.Lock()
        self._runner: threading.Thread | None = None
        self._tasks_begun = 0
        self._in_task = False
        self._watched = False
        self._watch = threading.Semaphore(0)

    def watch(self, descriptor: int, mask: int, handler: Callable[[int], None]) -> None:
        """Call the handler with each event of a file descriptor."""
        self._epoll.register(descriptor, mask)
        self._handlers[descriptor] = handler

    def change(self, descriptor: int, mask: int) -> None:
        """Change the events that a watched descriptor waits for."""
        self._epoll.modify(descriptor, mask)

    def forget(self, descriptor: int) -> None:
        """Stop watching a descriptor."""
        if self._handlers.pop(descriptor, None) is not None:
            with contextlib.suppress(OSError):
                self._epoll.unregister(descriptor)

    def call_soon(self, call: Callable[[], None]) -> None:
        """Call a function in the loop's thread; may be called from any thread."""
        self._calls.append(call)
        with contextlib.suppress(OSError):
            os.eventfd_write(self._wakeup, 1)

    def run_here(self, task: Callable[[], None]) -> None:
        """Run a short task in the loop's thread after the current event; to be called in that thread. It may take
        longer than it should: the loop is then continued by another thread."""
        self._tasks.append(task)

    def stop(self) -> None:
        """End :meth:`run` soon; may be called from any thread."""
        self._stopping = True
        self.call_soon(lambda: None)

    def run(self) -> None:
        """Run until :meth:`stop`; this thread watches that the tasks do not keep the loop waiting."""
        with self._lease:
            self._start_runner()
        seen, quiet = 0, 0
        while not self._done.is_set():
            if quiet > _REST_AFTER:
                self._watched = False
                self._watch.acquire()
                self._watched, quiet = True, 0
            self._done.wait(PATIENCE)
            begun = self._tasks_begun
            quiet = quiet + 1 if begun == seen and not self._in_task else 0
            if begun == seen and self._in_task:
                self._take_over(begun)
            seen = begun

    def _start_runner(self) -> None:
        """Start the thread that runs the loop from now on; the caller holds the lease."""
        runner = threading.Thread(target=self._turn, name="kedge-loop", daemon=True)
        before, self._runner = self._runner, runner
        try:
            runner.start()
        except RuntimeError:
            self._runner = before
            if before is None:
                raise

    def _take_over(self, begun: int) -> None:
        with self._lease:
            if self._in_task and self._tasks_begun == begun:
                self._in_task = False
                self._start_runner()

    def _turn(self) -> None:
        me = threading.current_thread()
        next_tick = time.monotonic()
        while not self._stopping:
            wait = 0.0 if self._tasks else max(next_tick - time.monotonic(), 0.0)
            for descriptor, mask in self._epoll.poll(wait, _MAX_EVENTS):
                # What an earlier event of this round closed is gone.
                handler = self._handlers.get(descriptor)
                if handler is not None:
                    self._guarded(handler, mask)
            for _ in range(len(self._calls)):
                self._guarded(self._calls.popleft())
            now = time.monotonic()
            if now >= next_tick:
                next_tick = now + self._period
                self._guarded(self._tick, now)
            # One a round, so that health is answered between two of them.
            if self._tasks and not self._run_task(me):
                return
        self._done.set()
        self._watch.release()

    def _run_task(self, me: threading.Thread) -> bool:
        """Run one task; return whether this thread still runs the loop."""
        task = self._tasks.popleft()
        self._tasks_begun += 1
        self._in_task = True
        if not self._watched:
            self._watched = True
            self._watch.release()
        self._guarded(task)
        with self._lease:
            if self._runner is not me:
                return False
            self._in_task = False
        return True

    def close(self) -> None:
        """Close the loop's own descriptors."""
        self._epoll.close()
        os.close(self._wakeup)

    def _drain_wakeup(self, _: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wakeup)

    @staticmethod
    def _guarded(call: Callable[..., None], *arguments: object) -> None:
        try:
            call(*arguments)
        except Exception:
            # One connection's bug must not end all others.
            log.exception("an event could not be handled")
