"""The models of the serving process: loads every installed model, and follows it when the fleet switches it.

A state folder has one bundle of each model. ``kedge-agent serve`` may hold several versions of one: each further one in
a state folder of its own (:func:`kedge_agent.slots.further_states`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kedge_agent import malloc, room, slots
from kedge_agent.model import Model
from kedge_agent.serving.running_figures import RunningFigures
from kedge_agent.serving.statistics import Statistics
from kedge_agent.serving.worker_pool import Monitor, WorkerPool
from kedge_protocol import codec
from kedge_protocol.errors import InputError, KedgeError
from kedge_protocol.packages import version_numbers

log = logging.getLogger("kedge.serving")


_NONE_YET = -1
"""No generation: what is installed has to be loaded."""
_LOOK_SECONDS = 0.02
_GIVES_WAY = "memory has no room for two versions, and the next one is being tried"


@dataclass
class Entry:
    """One installed model.

    Attributes:
        folder: the model's folder on disk.
        version: the version that was loaded last.
        generation: the generation that was seen last.
        workers: the pool that runs its calls.
        unloaded: whether a client unloaded it; then only a client loads it again.
        model: the loaded model; None if nothing could be loaded.
        error: why the installed bundle does not serve; an older one may still serve.
        untold: a report that could not be sent to the agent yet.
        unwritten: a report that could not be written to ``serving.json`` yet.
        report: the last report.
        leaving: what makes way for another version in memory, until nothing holds it any more.
    """

    folder: slots.ModelFolder
    generation: int
    workers: WorkerPool
    statistics: Statistics = field(default_factory=Statistics)
    version: str = ""
    model: Model | None = None
    unloaded: bool = False
    error: str | None = None
    untold: slots.Serving | None = None
    unwritten: slots.Serving | None = None
    report: slots.Serving | None = None
    leaving: weakref.ref[Any] | None = None


class ServedModels:
    """Loads the models that are installed in a state folder. One thread scans; any thread may look models up.

    Args:
        state: the agent's state folder.
        on_loaded: called with each model's name and report; returns whether the agent received it.
        workers: makes the worker pool of a model from its name.
        monitor: records which model is being loaded.
        excluded: digests of bundles that are not loaded because they took the process down.
    """

    def __init__(
        self,
        state: Path,
        on_loaded: Callable[[str, slots.Serving], bool] = lambda *_: True,
        workers: Callable[[str], WorkerPool] = WorkerPool,
        monitor: Monitor | None = None,
        excluded: Sequence[str] = (),
    ) -> None:
        self.state = state
        self._monitor = monitor
        self._excluded = frozenset(excluded)
        self._loading: tuple[str, float] | None = None
        self._workers = workers
        self._turn = threading.RLock()
        """Held during a load, so that there is one at a time."""
        self._on_loaded = on_loaded
        self._entries: dict[str, Entry] = {}
        self._versions: dict[str, list[Entry]] = {}
        self.figures = RunningFigures()
        self.first_scan = threading.Event()
        """Set once each model installed at the start is loaded or has failed to load."""

    @property
    def scanned(self) -> bool:
        """Return whether the first scan is done."""
        return self.first_scan.is_set()

    def names(self) -> list[str]:
        """Return the names of all installed models, sorted."""
        return sorted(self._versions)

    def versions(self, name: str) -> list[Entry]:
        """Return all versions of a model, the newest last; usually there is one."""
        return self._versions.get(name, [])

    def entries(self) -> list[Entry]:
        """Return all models in all versions, sorted by name."""
        return [entry for name in self.names() for entry in self.versions(name)]

    def get(self, name: str, version: str | None = None) -> Entry | None:
        """Return an installed model, or None if there is none, or several and none of this version.

        Args:
            version: by default the newest that can answer.
        """
        found = self._versions.get(name)
        if found is None:
            return None
        if len(found) == 1:
            return found[0]
        if version is not None:
            return next((entry for entry in found if entry.version == version), None)
        return next((entry for entry in reversed(found) if entry.model is not None), found[-1])

    def wait_for(self, name: str, version: str | None, seconds: float) -> None:
        """Wait, at most for so many seconds, until a model is there or the first scan is done: clients wait while a
        process that has just been started loads."""
        ends = time.monotonic() + seconds
        while self.get(name, version) is None and not self.first_scan.wait(_LOOK_SECONDS) and time.monotonic() < ends:
            pass

    def watch(self, stop: threading.Event, *, period: float = 0.5) -> None:
        """Scan every ``period`` seconds until ``stop`` is set."""
        while not stop.is_set():
            try:
                self.scan()
            except Exception:
                # One bad look at the disk must not end the watch.
                log.exception("the models folder could not be scanned")
            stop.wait(period)

    def scan(self) -> None:
        """Scan once: load new and switched models, release removed ones."""
        with self._turn:
            self._scan()

    def load(self, entry: Entry) -> None:
        """Load a model that a client had unloaded, or reload it; see :attr:`Entry.error` for the outcome."""
        with self._turn:
            old: Model | None = entry.model
            entry.unloaded, entry.model = False, None
            self._load(entry)
            if old is not None:
                old.close()

    def unload(self, entry: Entry) -> None:
        """Unload a model until a client loads it again. Running calls finish."""
        with self._turn:
            entry.unloaded, entry.error = True, "it was unloaded"
            model, entry.model = entry.model, None
            if model is not None:
                model.close()
            malloc.give_back()

    def _scan(self) -> None:
        folders = self._folders()
        for key in set(self._entries) - set(folders):
            entry = self._entries.pop(key)
            entry.workers.close()
            if entry.model is not None:
                entry.model.close()
            log.info("%s was removed", key)
        for key, folder in folders.items():
            self._follow(key, folder)
        self._arrange()
        self.figures.renew(self._entries)
        self.first_scan.set()

    def _arrange(self) -> None:
        """Put the versions of each model in order; other threads see the old order or the new one."""
        versions: dict[str, list[Entry]] = {}
        for entry in self._entries.values():
            versions.setdefault(entry.folder.name, []).append(entry)
        for several in versions.values():
            several.sort(key=lambda entry: (version_numbers(entry.version), entry.version))
        self._versions = versions

    def _folders(self) -> dict[str, slots.ModelFolder]:
        """Return the folder of each model by its key: its name, and for a further version what tells it from others."""
        found = {name: slots.ModelFolder(self.state, name) for name in slots.model_names(self.state)}
        for state in slots.further_states(self.state):
            for name in slots.model_names(state):
                found[f"{name} {state.name}"] = slots.ModelFolder(state, name)
        return found

    def _follow(self, key: str, folder: slots.ModelFolder) -> None:
        entry = self._entries.get(key)
        folder = folder if entry is None else entry.folder
        # In this order: a switch between the two lines is seen again in the next scan.
        generation = folder.generation()
        slot = folder.current()
        if entry is not None and entry.unloaded:
            return
        if slot is not None and (entry is None or entry.generation != generation or folder.gives_way(slot.digest)):
            entry = entry or Entry(folder, _NONE_YET, self._workers(key))
            self._renew(key, entry, slot, generation)
        if entry is not None and entry.untold is not None and self._on_loaded(key, entry.untold):
            entry.untold = None
        if entry is not None and entry.unwritten is not None:
            self._write(entry, log.debug)

    def _renew(self, key: str, entry: Entry, slot: slots.Slot, generation: int) -> None:
        """Load what is installed now; before that let go of what has to make way, which may take several scans."""
        ordered = entry.folder.gives_way(slot.digest)
        if ordered or self._crowded(entry, slot):
            self._let_go(entry)
        if entry.leaving is not None:
            malloc.give_back()
            if entry.leaving() is not None:
                return
            entry.leaving = None
        if ordered:
            entry.generation, entry.error = _NONE_YET, _GIVES_WAY
            if entry.report is None or entry.report.error != _GIVES_WAY:
                self._note(key, entry, slot)
            return
        self._load(entry)
        malloc.give_back()
        entry.generation = generation
        self._note(key, entry, slot)

    @staticmethod
    def _crowded(entry: Entry, slot: slots.Slot) -> bool:
        """Return whether memory has no room for the bundle of a slot beside the loaded one."""
        if entry.model is None or slot.digest == entry.model.digest:
            return False
        with contextlib.suppress(KedgeError, OSError):
            return not room.fits_beside(slot.bundle().config, entry.model.config)
        return False

    def _note(self, key: str, entry: Entry, slot: slots.Slot) -> None:
        """Say what became of a load."""
        model = entry.model
        entry.untold = slots.Serving(
            digest=slot.digest,
            pid=os.getpid(),
            error=None if entry.error is None else codec.sayable(entry.error),
            detail=None if model is None else codec.sayable(model.detail) or None,
            figures={} if model is None else dict(model.figures),
        )
        entry.unwritten = entry.report = entry.untold
        self._write(entry, log.error)
        self._entries[key] = entry
        self._arrange()

    @staticmethod
    def _let_go(entry: Entry) -> None:
        """Let a model's running answers end within :data:`kedge_agent.room.SWITCH_SECONDS`, and take no more."""
        model, entry.model = entry.model, None
        if model is not None:
            entry.error = _GIVES_WAY
            loaded = model.loaded()
            entry.leaving = loaded.retire(makes_room=True)
            model.close()
            log.info("%s %s makes way for another version", entry.folder.name, loaded.version)

    @staticmethod
    def _write(entry: Entry, complain: Callable[..., None]) -> None:
        try:
            if entry.unwritten is not None:
                entry.folder.write_serving(entry.unwritten)
            entry.unwritten = None
        except KedgeError as error:
            complain("%s", error)

    def hung(self, now: float, call_seconds: float, load_seconds: float) -> str | None:
        """Return the model whose call or load has taken too long (monotonic clock), or None if there is none."""
        loading = self._loading
        if loading is not None and now - loading[1] > load_seconds:
            return loading[0]
        late = (entry for entry in list(self._entries.values()) if entry.workers.longest_call(now) > call_seconds)
        return next((entry.workers.name for entry in late), None)

    @contextlib.contextmanager
    def _watched(self, name: str) -> Iterator[None]:
        """Show the agent which model is being loaded."""
        self._loading = name, time.monotonic()
        row = memoryview(bytearray(1)) if self._monitor is None else self._monitor.row(name)
        row[0] = 1
        if self._monitor is not None:
            self._monitor.loading(True)
        try:
            yield
        finally:
            self._loading = None
            if self._monitor is not None:
                self._monitor.loading(False)
                self._monitor.give_back(row)

    def _load(self, entry: Entry) -> None:
        current = entry.folder.current()
        if current is not None and not entry.version:
            with contextlib.suppress(KedgeError, OSError):
                entry.version = current.bundle().config.version
        if current is not None and current.digest in self._excluded:
            entry.model = None
            entry.error = "its runtime has taken the serving process down several times; it is not loaded again"
            log.error("%s %s is not loaded: %s", entry.folder.name, current.digest, entry.error)
            return
        with self._watched(entry.workers.name):
            self._load_now(entry)
        if entry.model is not None:
            with contextlib.suppress(InputError):  # it was closed meanwhile
                entry.version = entry.model.version

    @staticmethod
    def _load_now(entry: Entry) -> None:
        entry.error = None
        try:
            if entry.model is None:
                entry.model = Model(entry.folder.name, state=entry.folder.state)
                entry.model.hold()  # a scan looks for room before it loads the next version
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
            with contextlib.suppress(InputError):  # it was closed meanwhile
                loaded = entry.model.loaded()
                entry.workers.threads = loaded.threads
                entry.workers.gathers = loaded.plan is not None and loaded.plan.most > 1
            log.info("%s serves %s %s", entry.folder.name, entry.model.version, entry.model.digest)
