"""The models that the serving child has loaded: every one that is installed, followed as the fleet switches them."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kedge_agent import malloc, slots
from kedge_agent.model import Model
from kedge_protocol import codec
from kedge_protocol.errors import KedgeError

log = logging.getLogger("kedge.serving")


@dataclass
class Entry:
    """One installed model.

    Attributes:
        folder: of the model on disk.
        generation: that was looked at last.
        model: None where nothing could be loaded.
        error: why the bundle that is installed now does not serve; an older one may serve still.
        untold: what is to be told to the agent and could not be yet.
        unwritten: what is to be written to ``serving.json`` and could not be yet.
    """

    folder: slots.ModelFolder
    generation: int
    model: Model | None = None
    error: str | None = None
    untold: slots.Serving | None = None
    unwritten: slots.Serving | None = None


class ServedModels:
    """Loads what is installed in a state folder. One thread scans; any thread may look models up.

    Args:
        state: the agent's state folder.
        tell: told what was loaded of a model; returns whether the agent heard.
    """

    def __init__(self, state: Path, tell: Callable[[str, slots.Serving], bool] = lambda *_: True) -> None:
        self.state = state
        self.scanning_since: float | None = None
        """Steady clock at the beginning of the scan under way; a load may hang in it."""
        self._tell = tell
        self._entries: dict[str, Entry] = {}
        self.scanned = False

    def names(self) -> list[str]:
        """Names of all installed models, sorted."""
        return sorted(self._entries)

    def get(self, name: str) -> Entry | None:
        """An installed model, or None."""
        return self._entries.get(name)

    def watch(self, stop: threading.Event, *, period: float = 0.5) -> None:
        """Scan every ``period`` seconds until ``stop`` is set."""
        while not stop.is_set():
            self.scanning_since = time.monotonic()
            try:
                self.scan()
            except Exception:
                # One bad look at the disk must not end the watch.
                log.exception("the models folder could not be scanned")
            self.scanning_since = None
            stop.wait(period)

    def scan(self) -> None:
        """Look once: load what is new or switched, let go of what was removed."""
        names = slots.model_names(self.state)
        for name in set(self._entries) - set(names):
            entry = self._entries.pop(name)
            if entry.model is not None:
                entry.model.close()
            log.info("%s was removed", name)
        for name in names:
            self._follow(name)
        self.scanned = True

    def _follow(self, name: str) -> None:
        entry = self._entries.get(name)
        folder = slots.ModelFolder(self.state, name) if entry is None else entry.folder
        # In this order: a switch between the two lines is seen again in the next scan.
        generation = folder.generation()
        slot = folder.current()
        if slot is not None and (entry is None or entry.generation != generation):
            entry = entry or Entry(folder, generation)
            self._load(entry)
            malloc.give_back()
            entry.generation = generation
            model = entry.model
            entry.untold = slots.Serving(
                digest=slot.digest,
                pid=os.getpid(),
                error=None if entry.error is None else codec.sayable(entry.error),
                detail=None if model is None else codec.sayable(model.detail) or None,
                figures={} if model is None else dict(model.figures),
            )
            entry.unwritten = entry.untold
            self._write(entry, log.error)
            self._entries[name] = entry
        if entry is not None and entry.untold is not None and self._tell(name, entry.untold):
            entry.untold = None
        if entry is not None and entry.unwritten is not None:
            self._write(entry, log.debug)

    @staticmethod
    def _write(entry: Entry, complain: Callable[..., None]) -> None:
        try:
            if entry.unwritten is not None:
                entry.folder.write_serving(entry.unwritten)
            entry.unwritten = None
        except KedgeError as error:
            complain("%s", error)

    def _load(self, entry: Entry) -> None:
        entry.error = None
        try:
            if entry.model is None:
                entry.model = Model(entry.folder.name, state=self.state)
            else:
                entry.model.refresh()
                if entry.model.failure is not None:
                    entry.error = str(entry.model.failure)
        except KedgeError as error:
            log.error("%s cannot be loaded: %s", entry.folder.name, error)
            entry.error = str(error)
        except Exception as error:
            # Whatever else a runtime may raise: the other models go on.
            log.exception("%s cannot be loaded", entry.folder.name)
            entry.error = f"{type(error).__name__}: {error}"
        if entry.error is None and entry.model is not None:
            log.info("%s serves %s %s", entry.folder.name, entry.model.version, entry.model.digest)
