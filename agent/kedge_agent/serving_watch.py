"""What the serving child says of itself, as events for the update machine."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from kedge_agent.slots import ModelFolder, model_names
from kedge_agent.update.events import Served

REPEAT_SECONDS = 1.0
MAX_DEATHS = 3
"""Deaths in a row before the bundles are told not to serve."""


class ServingWatch:
    """Looks at every model's ``serving.json``.

    Args:
        state: the agent's state folder.
        served_by_child: whether there is a serving child; without one, a bundle that is current serves (applications
            load it themselves).
    """

    def __init__(self, state: Path, *, served_by_child: bool) -> None:
        self._state = state
        self._by_child = served_by_child
        self._seen: dict[str, tuple[tuple[int, int, str], float]] = {}
        self._deaths: tuple[int, str] = (0, "")

    def forget_all(self) -> None:
        """What a child that is gone said is worth nothing."""
        self._seen.clear()
        for path in (self._state / "models").glob("*/serving.json"):
            with contextlib.suppress(OSError):
                path.unlink()

    def child_died(self, deaths: int, last_words: str) -> None:
        """The child was found dead, ``deaths`` times in a row."""
        self.forget_all()
        self._deaths = deaths, last_words

    def look(self) -> list[Served]:
        """What is new since the last call, and every second what still holds: an update that comes back to the bundle
        which serves already waits for it too."""
        found = []
        deaths, words = self._deaths
        self._deaths = 0, ""
        for name in model_names(self._state):
            folder = ModelFolder(self._state, name)
            current = folder.current()
            if current is None:
                continue
            if deaths >= MAX_DEATHS:
                error = f"the serving process died {deaths} times in a row; it {words}"
                found.append(Served(name, current.digest, error))
                continue
            said = self._said(folder, current.digest)
            if said is not None:
                found.append(said)
        return found

    def _said(self, folder: ModelFolder, current: str) -> Served | None:
        if not self._by_child:
            mark = (0, 0, current)
            said = Served(folder.name, current)
        else:
            try:
                status = folder.serving_file.stat()
            except OSError:
                return None
            mark = (status.st_mtime_ns, status.st_ino, current)
            serving = folder.serving() if not self._said_lately(folder.name, mark) else None
            if serving is None or serving.digest != current:
                return None
            said = Served(folder.name, current, serving.error, serving.detail)
        if self._said_lately(folder.name, mark):
            return None
        self._seen[folder.name] = mark, time.monotonic()
        return said

    def _said_lately(self, name: str, mark: tuple[int, int, str]) -> bool:
        seen, at = self._seen.get(name, (None, 0.0))
        return seen == mark and time.monotonic() - at < REPEAT_SECONDS
