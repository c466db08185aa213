"""Virtual time: an event queue. Nothing sleeps; equal calls in equal order give equal runs."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

EPOCH = 1_800_000_000.0
"""The wall clock of a simulation's start, in seconds since 1970."""


class Timer:
    """Something that happens later, unless it is cancelled."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[[], None]) -> None:
        self.function: Callable[[], None] | None = function

    def cancel(self) -> None:
        """Let it not happen."""
        self.function = None


class VirtualClock:
    """The time of a simulation, in seconds from its start."""

    def __init__(self) -> None:
        self.now = 0.0
        self._waiting: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()

    def steady(self) -> float:
        """Return the seconds since the start."""
        return self.now

    def wall(self) -> float:
        """Return the seconds since 1970."""
        return EPOCH + self.now

    def later(self, seconds: float, function: Callable[[], None]) -> Timer:
        """Call ``function`` after so many seconds."""
        timer = Timer(function)
        heapq.heappush(self._waiting, (self.now + seconds, next(self._order), timer))
        return timer

    def run(self, until: float, stopped: Callable[[], bool]) -> None:
        """Let time pass until then, or until ``stopped`` after an event."""
        while self._waiting and self._waiting[0][0] <= until:
            at, _, timer = heapq.heappop(self._waiting)
            if timer.function is None:
                continue
            self.now = at
            timer.function()
            if stopped():
                return
        self.now = max(self.now, until)
