"""How often the serving process died lately."""

from __future__ import annotations

from collections import deque


class Crashes:
    """Deaths of the serving process.

    Args:
        most: so many within the window are a crash loop.
        window: seconds.
    """

    def __init__(self, most: int, window: float) -> None:
        self.total = 0
        """Since the agent's start."""
        self.window = window
        self._most = most
        self._deaths: deque[tuple[float, bool]] = deque(maxlen=1000)

    def note(self, now: float, *, came_up: bool) -> None:
        """It died, or could not even begin."""
        self.total += 1
        self._deaths.append((now, came_up))

    def lately(self, now: float) -> int:
        """Deaths within the window."""
        while self._deaths and now - self._deaths[0][0] > self.window:
            self._deaths.popleft()
        return len(self._deaths)

    def began(self, now: float) -> bool:
        """Whether it had begun to serve before one of them; else no bundle is to blame."""
        return self.lately(now) > 0 and any(came_up for _, came_up in self._deaths)

    def looping(self, now: float) -> bool:
        """Whether it dies again and again."""
        return self.lately(now) >= self._most

    def forget(self) -> None:
        """What was to blame is gone: count anew."""
        self._deaths.clear()
