"""Counts recent deaths of the serving process."""

from __future__ import annotations

from collections import deque


class Crashes:
    """Deaths of the serving process.

    Args:
        most: number of deaths within the window that counts as a crash loop.
        window: length of the window in seconds.
    """

    def __init__(self, most: int, window: float) -> None:
        self.total = 0
        """Number of deaths since the agent's start."""
        self.window = window
        self._most = most
        self._deaths: deque[tuple[float, bool]] = deque(maxlen=1000)

    def note(self, now: float, *, came_up: bool) -> None:
        """Note a death, or a start that failed."""
        self.total += 1
        self._deaths.append((now, came_up))

    def lately(self, now: float) -> int:
        """Return the deaths within the window."""
        while self._deaths and now - self._deaths[0][0] > self.window:
            self._deaths.popleft()
        return len(self._deaths)

    def began(self, now: float) -> bool:
        """Return whether it served before one of them; otherwise no bundle is to blame."""
        return self.lately(now) > 0 and any(came_up for _, came_up in self._deaths)

    def looping(self, now: float) -> bool:
        """Return whether it is in a crash loop."""
        return self.lately(now) >= self._most

    def forget(self) -> None:
        """Restart the count after the cause is gone."""
        self._deaths.clear()
