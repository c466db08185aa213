"""The time that a compilation may spend on looking."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from kedge.search.effort import Effort


@dataclass(kw_only=True)
class Clock:
    """Counts from when it was made.

    Attributes:
        limit: seconds; infinite where nothing bounds the search.
        said: who set it.
        lenient: whether what runs now may take as long as it wants: the first candidate of each target does, for a
            search that tried nothing is of no use.
    """

    limit: float = float("inf")
    said: str = ""
    began: float = field(default_factory=time.monotonic)
    lenient: bool = True

    @classmethod
    def of(cls, effort: Effort, time_limit: float | None) -> Clock:
        """The user's limit, else that of the effort."""
        if time_limit is not None:
            return cls(limit=time_limit, said="--time-limit")
        return cls(limit=effort.seconds, said=f"--effort {effort.value}")

    @property
    def late(self) -> bool:
        """Whether the time is up."""
        return self.left <= 0

    @property
    def left(self) -> float:
        """Seconds; below 0 when the time is up."""
        return self.limit - (time.monotonic() - self.began)
