"""The models of the serving process: loads every installed model, and follows it when the fleet switches it."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kedge_agent import malloc, slots
from kedge_agent.loaded import Loaded
from kedge_agent.model import Model
from kedge_agent.serving.running_figures import RunningFigures
from kedge_agent.serving.statistics import Statistics
from kedge_agent.serving.worker_pool import Monitor, WorkerPool
from kedge_protocol import codec
from kedge_protocol.errors import InputError, KedgeError

log = logging.getLogger("kedge.serving")


@dataclass
class Entry:
    """One installed model.

    Attributes:
        folder: the model's folder on disk.
        generation: the generation that was seen last.
        workers: the pool that runs its calls.
        unloaded: whether a client unloaded it; then only a client loads it again.
        model: the loaded model; None if nothing could be loaded.
        error: why the installed bundle does not serve; an older one may still serve.
        untold: a report that could not be sent to the agent yet.
        unwritten: a report that could not be written to ``serving.json`` yet.
        report: the last report.
    """

    folder: slots.ModelFolder
    generation: int
    workers: WorkerPool
    statistics: Statistics = field(default_factory=Statistics)
    model: Model | None = None
    unloaded: bool = False
    error: str | None = None
    untold: slots.Serving | None = None
    unwritten: slots.Serving | None = None
    report: slots.Serving | None = None


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
        self.figures = RunningFigures()
        self.first_scan = threading.Event()
        """Set once each model installed at the start is loaded or has failed to load."""

    @property
    def scanned(self) -> bool:
        """Return whether the first scan is done."""
        return self.first_scan.is_set()

    def names(self) -> list[str]:
        """Return the names of all installed models, sorted."""
        return sorted(self._entries)

    def get(self, name: str) -> Entry | None:
        """Return an installed model, or None."""
        return self._entries.get(name)

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

    def load(self, name: str) -> None:
        """Load a model that a client had unloaded, or reload it; see :attr:`Entry.error` for the outcome."""
        with self._turn:
            entry = self._entries.get(name)
            if entry is None:
                return
            old: Model | None = entry.model
            entry.unloaded, entry.model = False, None
            self._load(entry)
            if old is not None:
                old.close()

    def unload(self, name: str) -> None:
        """Unload a model until a client loads it again. Running calls finish."""
        with self._turn:
            entry = self._entries.get(name)
            if entry is not None:
                entry.unloaded, entry.error = True, "it was unloaded"
                model, entry.model = entry.model, None
                if model is not None:
                    model.close()
                malloc.give_back()

    def _scan(self) -> None:
        names = slots.model_names(self.state)
        for name in set(self._entries) - set(names):
            entry = self._entries.pop(name)
            entry.workers.close()
            if entry.model is not None:
                entry.model.close()
            log.info("%s was removed", name)
        for name in names:
            self._follow(name)
        self.figures.renew(self._entries)
        self.first_scan.set()

    def _follow(self, name: str) -> None:
        entry = self._entries.get(name)
        folder = slots.ModelFolder(self.state, name) if entry is None else entry.folder
        # In this order: a switch between the two lines is seen again in the next scan.
        generation = folder.generation()
        slot = folder.current()
        if entry is not None and entry.unloaded:
            return
        if slot is not None and (entry is None or entry.generation != generation):
            entry = entry or Entry(folder, generation, self._workers(name))
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
            entry.unwritten = entry.report = entry.untold
            self._write(entry, log.error)
            self._entries[name] = entry
        if entry is not None and entry.untold is not None and self._on_loaded(name, entry.untold):
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

    def hung(self, now: float, call_seconds: float, load_seconds: float) -> str | None:
        """Return the model whose call or load has taken too long (monotonic clock), or None if there is none."""
        loading = self._loading
        if loading is not None and now - loading[1] > load_seconds:
            return loading[0]
        late = (entry for entry in list(self._entries.values()) if entry.workers.longest_call(now) > call_seconds)
        return next((entry.folder.name for entry in late), None)

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
        if current is not None and current.digest in self._excluded:
            entry.model = None
            entry.error = "its runtime has taken the serving process down several times; it is not loaded again"
            log.error("%s %s is not loaded: %s", entry.folder.name, current.digest, entry.error)
            return
        with self._watched(entry.folder.name):
            self._load_now(entry)

    @staticmethod
    def _load_now(entry: Entry) -> None:
        entry.error = None
        try:
            if entry.model is None:
                entry.model = Model(entry.folder.name, state=entry.folder.state)
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
                entry.workers.threads = calls_at_once(entry.model.loaded())
            log.info("%s serves %s %s", entry.folder.name, entry.model.version, entry.model.digest)


def calls_at_once(loaded: Loaded) -> int:
    """Return how many calls of a bundle may run at the same time: as many as have cores for the threads that the bundle
    asks for (``threads`` in its runtime options; all cores by default), and one if its runtime runs one at a time."""
    cores = len(os.sched_getaffinity(0))
    threads = loaded.bundle.config.runtime_options.get("threads", 0)
    known = isinstance(threads, int) and 0 < threads <= cores
    return cores // threads if loaded.concurrent and known else 1
