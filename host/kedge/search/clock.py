"""The time that a compilation may spend on the search."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from kedge.search.effort import Effort


@dataclass(kw_only=True)
class Clock:
    """A time limit that counts from when the clock is made.

    Attributes:
        limit: seconds; infinite if nothing limits the search.
        said: the option that set the limit.
        lenient: whether the current candidate may exceed the limit: the first one of each target may, since a search
            that tried nothing is useless.
        waiting: backends of the current target whose turn is still to come.
        reserved: seconds of those left that these have for themselves.
    """

    limit: float = float("inf")
    said: str = ""
    began: float = field(default_factory=time.monotonic)
    lenient: bool = True
    waiting: int = 0
    reserved: float = 0.0

    @classmethod
    def of(cls, effort: Effort, time_limit: float | None) -> Clock:
        """Return a clock with the user's limit, or else that of the effort."""
        if time_limit is not None:
            return cls(limit=time_limit, said="--time-limit")
        return cls(limit=effort.seconds, said=f"--effort {effort.value}")

    @property
    def late(self) -> bool:
        """Return whether the time is up."""
        return self.left <= 0

    @property
    def left(self) -> float:
        """Return the seconds left; negative when the time is up."""
        return self.limit - (time.monotonic() - self.began)

    def begin_turn(self, waiting: int) -> None:
        """Begin the turn of a backend, which leaves each of those that wait as much time as it may take itself: on a
        machine at other work, what the first does about its losses would else take all of it."""
        self.waiting = waiting
        self.reserved = self.left * waiting / (1 + waiting) if 0 < self.left < math.inf else 0.0

    @property
    def share(self) -> float:
        """Return the seconds left of the current turn."""
        return self.left - self.reserved

    @property
    def ended(self) -> str:
        """Return what the time ended, in words; empty as long as some is left."""
        if self.share > 0:
            return ""
        limit = f"{self.limit:g} s ({self.said})"
        return f"the search ended after {limit}" if self.late else f"a backend ended after its part of {limit}"
