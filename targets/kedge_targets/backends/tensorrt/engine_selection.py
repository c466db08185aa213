"""Builds missing engines and chooses the fastest: the parent process's side.

All results are kept, including failures: a device that cannot build an engine must not try for half an hour again at
each start.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kedge_protocol.bundle.config import BundleConfig
from kedge_protocol.errors import (
    KedgeError,
    StorageError,
    WorkerCrashedError,
    WorkerError,
    WorkerMemoryError,
)
from kedge_targets.backends.tensorrt import build, device
from kedge_targets.backends.tensorrt.cache import Cache, Kept, name_of
from kedge_targets.backends.tensorrt.device import Identity
from kedge_targets.backends.tensorrt.recipe import Recipe
from kedge_targets.worker import Progress, Worker

log = logging.getLogger("kedge.tensorrt")

_MEASURE_SECONDS = 120.0
_LOOK_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The resources that building one engine may use.

    Attributes:
        seconds: time for one engine.
        memory_bytes: the child's own memory; 0 for three quarters of the device's.
        spare_bytes: memory that must stay available on the whole device. A Jetson's GPU uses the same memory, which the
            child's own figure does not include, and a Jetson that runs out of memory freezes.
    """

    seconds: float = 1800.0
    memory_bytes: int = 0
    spare_bytes: int = 192 << 20


@dataclass(frozen=True)
class Bench:
    """The recipe, device, cache and limits to build with.

    Attributes:
        entry: path of the recipe, ``recipe`` its content.
        here: this device.
        available: returns the bytes of memory: the total, and what is available now.
    """

    entry: Path
    recipe: Recipe
    here: Identity
    cache: Cache
    limits: Limits
    available: Callable[[], tuple[int, int]]


def engine(bench: Bench, kernel_set: str, progress: Progress) -> Kept:
    """Return the engine of one kernel set, from the cache or newly built.

    Raises:
        KedgeError: the engine cannot be built (now, or in an earlier attempt).
    """
    name = device.engine_name(bench.entry, bench.recipe, kernel_set, bench.here)
    kept = _kept(bench, name)
    if kept is not None:
        return kept
    with bench.cache.alone(name, seconds=2 * bench.limits.seconds):
        kept = _kept(bench, name)
        if kept is not None:
            return kept
        log.info("building the %s engine for %s", kernel_set, bench.here)
        try:
            made = _build(bench, kernel_set, name, progress)
        except StorageError:
            raise
        except KedgeError as error:
            reason = _reason(error)
            log.warning("the %s engine cannot be built: %s", kernel_set, reason)
            # What ran out may be there again after the next start; what TensorRT refuses it will refuse again.
            until = device.boot_id() if isinstance(error, WorkerError) else ""
            bench.cache.store(name, {"failure": reason, "until": until})
            raise
        log.info("built the %s engine in %.1f s, %d bytes", kernel_set, made.seconds, made.engine_bytes)
    kept = bench.cache.load(name)
    if kept is None:
        raise StorageError("the engine that was just built is gone", where=str(bench.cache.folder))
    return kept


def choose(bench: Bench, folder: Path, config: BundleConfig, progress: Progress) -> dict[str, Any]:
    """Measure every kernel set of the recipe once, and choose the fastest that passes the golden vectors.

    Returns:
        ``kernel_set``: its name, None if none passes; ``reason``: in words.

    Raises:
        StorageError: the cache cannot be used.
    """
    names = {one: device.engine_name(bench.entry, bench.recipe, one, bench.here) for one in bench.recipe.precisions}
    name = name_of("choice", {"engines": names, "golden": config.golden.digest, **asdict(bench.here)})
    kept = bench.cache.load(name)
    if kept is not None and kept.head["until"] in ("", device.boot_id()):
        return kept.head
    measured: dict[str, build.MeasureAnswer] = {}
    reasons: dict[str, str] = {}
    until = ""
    for kernel_set in bench.recipe.precisions:
        try:
            engine(bench, kernel_set, _named(progress, kernel_set))
            found = _measure(bench, folder, config, kernel_set, progress)
        except StorageError:
            raise
        except KedgeError as error:
            reasons[kernel_set] = _reason(error)
            until = device.boot_id() if isinstance(error, WorkerError) else until
            continue
        if found.holds:
            measured[kernel_set] = found
        else:
            reasons[kernel_set] = found.reason
    head: dict[str, Any] = {"kernel_set": None, "until": until}
    told = [f"{one} {measured[one].milliseconds:.3g} ms" for one in measured]
    told += [f"{one}: {reason}" for one, reason in reasons.items()]
    if measured:
        head["kernel_set"] = min(measured, key=lambda one: measured[one].milliseconds)
    head["reason"] = "; ".join(told)
    log.info("%s: %s takes %s (%s)", config.name, bench.here, head["kernel_set"], head["reason"])
    bench.cache.store(name, head)
    return head


def _kept(bench: Bench, name: str) -> Kept | None:
    """Return what the cache holds, if anything; raise a recorded failure that still applies."""
    kept = bench.cache.load(name)
    if kept is None or "failure" not in kept.head:
        return kept
    if kept.head["until"] not in ("", device.boot_id()):
        return None
    raise WorkerError(f"{kept.head['failure']} (tried before)")


def _build(bench: Bench, kernel_set: str, name: str, progress: Progress) -> build.BuildAnswer:
    limits = bench.limits
    total, _ = bench.available()
    request = build.BuildRequest(
        entry=str(bench.entry), kernel_set=kernel_set, name=name, cache=str(bench.cache.folder)
    )
    with Worker(name=f"build-{kernel_set}", memory_limit=limits.memory_bytes or total * 3 // 4 or None) as worker:
        guard = _Guard(worker, bench)
        try:
            return worker.call(build.BUILD, request, build.BuildAnswer, deadline=limits.seconds, on_progress=progress)
        except WorkerCrashedError as error:
            if guard.least is None:
                raise
            raise WorkerMemoryError(
                f"building was ended: the device had {guard.least >> 20} MiB of memory left", where=kernel_set
            ) from error
        finally:
            guard.end()


def _measure(
    bench: Bench, folder: Path, config: BundleConfig, kernel_set: str, progress: Progress
) -> build.MeasureAnswer:
    request = build.MeasureRequest(
        folder=str(folder), config=config, kernel_set=kernel_set, cache=str(bench.cache.folder.parent)
    )
    with Worker(name=f"measure-{kernel_set}") as worker:
        return worker.call(
            build.MEASURE,
            request,
            build.MeasureAnswer,
            deadline=_MEASURE_SECONDS,
            on_progress=_named(progress, f"measure {kernel_set}"),
        )


class _Guard:
    """Watches the whole device's memory while a child builds, and ends the child before the memory runs out."""

    def __init__(self, worker: Worker, bench: Bench) -> None:
        self.least: int | None = None
        """Bytes that were available when the child was ended; None if it was not."""
        self._worker = worker
        self._bench = bench
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="kedge-build-memory", daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(_LOOK_SECONDS):
            total, available = self._bench.available()
            if total and available < self._bench.limits.spare_bytes:
                self.least = available
                self._worker.stop()
                return


def _named(progress: Progress, name: str) -> Progress:
    def on_progress(what: str, done: int, total: int) -> None:
        progress(f"{name}: {what}", done, total)

    return on_progress


def _reason(error: KedgeError) -> str:
    """Return an error's reason in one line; a worker's remedy is its whole log."""
    where = "" if isinstance(error, WorkerError) or error.where is None else f"{error.where}: "
    return f"{where}{error.what}"
