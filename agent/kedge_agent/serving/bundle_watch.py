"""What the serving child says of itself, as events for the update machine."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from kedge_agent.slots import ModelFolder, Serving, model_names
from kedge_agent.update.events import Served

REPEAT_SECONDS = 1.0


class ServingWatch:
    """Compares what is current with what the child says that it has loaded.

    Args:
        state: the agent's state folder.
        said: model name → what the child that lives said last; without a child, a bundle that is current serves
            (applications load it themselves).
    """

    def __init__(self, state: Path, said: Callable[[str], Serving | None] | None) -> None:
        self._state = state
        self._said = said
        self._seen: dict[str, tuple[Served, float]] = {}

    def forget_all(self) -> None:
        """What a child that is gone said is worth nothing."""
        self._seen.clear()
        for path in (self._state / "models").glob("*/serving.json"):
            with contextlib.suppress(OSError):
                path.unlink()

    def look(self) -> list[Served]:
        """What is new since the last call, and every second what still holds: an update that comes back to the bundle
        which serves already waits for it too."""
        found = []
        for name in model_names(self._state):
            current = ModelFolder(self._state, name).current()
            if current is None:
                continue
            serving = Serving(digest=current.digest, pid=0) if self._said is None else self._said(name)
            if serving is None or serving.digest != current.digest:
                continue
            event = Served(name, current.digest, serving.error, serving.detail)
            if not self._told_lately(event):
                self._seen[name] = event, time.monotonic()
                found.append(event)
        return found

    def _told_lately(self, event: Served) -> bool:
        seen, at = self._seen.get(event.model, (None, 0.0))
        return seen == event and time.monotonic() - at < REPEAT_SECONDS
