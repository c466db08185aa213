"""Turns the serving process's status into events for the update state machine."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from kedge_agent.slots import ModelFolder, Serving, model_names
from kedge_agent.update.events import Served

REPEAT_SECONDS = 1.0


class ServingWatch:
    """Compares the installed bundles with those that the serving process reports as loaded.

    Args:
        state: the agent's state folder.
        said: model name → the last report of the running serving process; None without such a process: then each
            installed bundle counts as serving (applications load it themselves).
    """

    def __init__(self, state: Path, said: Callable[[str], Serving | None] | None) -> None:
        self._state = state
        self._said = said
        self._seen: dict[str, tuple[Served, float]] = {}

    def forget_all(self) -> None:
        """Discard everything that an ended process reported."""
        self._seen.clear()
        for path in (self._state / "models").glob("*/serving.json"):
            with contextlib.suppress(OSError):
                path.unlink()

    def look(self) -> list[Served]:
        """Return new events, and once a second those that still hold, since an update that returns to the bundle
        already served waits for its event too."""
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
