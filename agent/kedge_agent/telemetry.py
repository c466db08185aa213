"""Telemetry of the device: calls in all processes, memory, CPU, temperature."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from kedge_agent import counters, system
from kedge_agent.paces import PaceReader
from kedge_agent.sketches import SketchReader
from kedge_agent.slots import ModelFolder
from kedge_protocol import latency_buckets, memory
from kedge_protocol.drift import Stream
from kedge_protocol.errors import BundleError
from kedge_protocol.messages import ModelTelemetry, ShadowTelemetry, Telemetry
from kedge_protocol.telemetry import BoardTelemetry
from kedge_targets import jetson


class Meter:
    """Measures one interval after another.

    Args:
        state: the agent's state folder.
        boot_id: boot id of this start.
        now: seconds of the monotonic clock that is also used for :meth:`measure`.
        root: root of the file system with the board's sensors.
    """

    def __init__(self, state: Path, boot_id: str, now: float, *, root: Path = jetson.ROOT) -> None:
        self._state = state
        self._boot_id = boot_id
        self._seq = 0
        self._last_at = now
        self._totals: dict[str, counters.Totals] = {}
        self._sketches: dict[str, SketchReader] = {}
        self._paces: dict[str, PaceReader] = {}
        self._baselines: dict[str, tuple[str, tuple[Stream, ...]]] = {}
        """Model name → digest of its bundle, and that bundle's drift baseline."""
        self._cpu = system.CpuMeter()
        self._root = root

    def measure(
        self,
        digests: Mapping[str, str | None],
        pids: Iterable[int],
        free_bytes: int,
        now: float,
        *,
        serving: int | None = None,
        shadow: Callable[[str], ShadowTelemetry | None] = lambda _: None,
    ) -> Telemetry:
        """Return the figures since the last call.

        Args:
            digests: model name → digest of the serving bundle.
            pids: process ids of the agent.
            free_bytes: free space of the disk.
            now: seconds of a monotonic clock.
            serving: that of the serving process, if there is one.
            shadow: model name → what its shadow answered.
        """
        self._seq += 1
        interval, self._last_at = now - self._last_at, now
        device = memory.of_device()
        held = None if serving is None else memory.resident(serving)
        models = {name: self._model(name, digest, held) for name, digest in digests.items()}
        return Telemetry(
            boot_id=self._boot_id,
            seq=self._seq,
            interval=round(interval, 3),
            models={name: replace(model, shadow=shadow(name)) for name, model in models.items()},
            cpu_percent=self._cpu.percent(),
            memory_total_bytes=device.total,
            memory_available_bytes=device.available,
            agent_bytes=system.resident_bytes(pids),
            free_bytes=free_bytes,
            temperature_c=system.temperature(),
            board=self._board(),
            at=time.time(),
        )

    def fold(self, models: Iterable[str]) -> None:
        """Add the counts of ended processes; the interval continues."""
        for name in models:
            folder = ModelFolder(self._state, name)
            counters.collect(folder.counters)
            self._reader(folder).look()
            self._pace(folder).look()

    def _board(self) -> BoardTelemetry | None:
        found = jetson.look(self._root)
        if found is None:
            return None
        return BoardTelemetry(
            gpu_percent=found.gpu_percent,
            power_mw=found.power_mw,
            temperatures_c=found.temperatures_c,
            power_mode=found.power_mode,
        )

    def calls(self, name: str, digest: str) -> int:
        """Return the calls that a bundle had answered at the last measurement."""
        total = self._totals.get(name)
        return 0 if total is None else total.digests.get(digest, 0)

    def _model(self, name: str, digest: str | None, memory_bytes: int | None) -> ModelTelemetry:
        folder = ModelFolder(self._state, name)
        total = counters.collect(folder.counters)
        # Calls before this start belong to no interval of it.
        since = total - self._totals.get(name, total)
        self._totals[name] = total
        serving = folder.serving()
        return ModelTelemetry(
            digest=digest,
            inferences=since.inferences,
            errors=since.errors,
            inferences_total=total.inferences,
            errors_total=total.errors,
            latency_ms=since.latency_ms(),
            latency_buckets=latency_buckets.sparse(since.buckets),
            mixed=any(count for other, count in since.digests.items() if other != digest),
            memory_bytes=memory_bytes,
            drift=self._drift(folder, digest),
            generation=self._pace(folder).take(),
            figures=serving.figures if serving is not None and serving.digest == digest else {},
        )

    def _drift(self, folder: ModelFolder, digest: str | None) -> dict[str, tuple[int, ...]]:
        known, streams = self._baselines.get(folder.name, (None, ()))
        if digest is not None and known != digest:
            with contextlib.suppress(OSError, BundleError):
                streams = folder.slot(digest).bundle().config.drift or ()
                self._baselines[folder.name] = digest, streams
        return self._reader(folder).take(digest or "", streams)

    def _pace(self, folder: ModelFolder) -> PaceReader:
        if folder.name not in self._paces:
            self._paces[folder.name] = PaceReader(folder)
        return self._paces[folder.name]

    def _reader(self, folder: ModelFolder) -> SketchReader:
        if folder.name not in self._sketches:
            self._sketches[folder.name] = SketchReader(folder.sketches)
        return self._sketches[folder.name]
