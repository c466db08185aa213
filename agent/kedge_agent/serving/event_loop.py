"""One thread for all connections: waits for sockets (epoll), for calls from other threads, and for the clock.

``asyncio`` would do the same but take 6 MiB of memory; an agent with a model has 60.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import time
from collections import deque
from collections.abc import Callable

log = logging.getLogger("kedge.serving")

READ, WRITE = select.EPOLLIN, select.EPOLLOUT
FAILED = select.EPOLLHUP | select.EPOLLERR
"""The peer has closed both directions."""
_MAX_EVENTS = 256


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
        self._stopping = False

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

    def stop(self) -> None:
        """End :meth:`run` soon; may be called from any thread."""
        self._stopping = True
        self.call_soon(lambda: None)

    def run(self) -> None:
        """Run until :meth:`stop`."""
        next_tick = time.monotonic()
        while not self._stopping:
            events = self._epoll.poll(max(next_tick - time.monotonic(), 0.0), _MAX_EVENTS)
            for descriptor, mask in events:
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
