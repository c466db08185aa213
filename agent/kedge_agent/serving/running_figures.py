"""Figures of running models for telemetry: processor time and energy an inference, and the shares of
kept answers and of those by a larger model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from kedge_agent.serving.statistics import Counts
from kedge_targets.energy import EnergyMeter, Spending

if TYPE_CHECKING:
    from kedge_agent.serving.model_pool import Entry

PERIOD = 300.0
"""Seconds between two reports that differ in figures alone: they are files on a device's flash memory."""
_SENSOR_PERIOD = 1.0


class RunningFigures:
    """Renews the reports of models that were called.

    Args:
        meter: reads the energy.
        root: root of the file system with ``/proc/stat``.
    """

    def __init__(self, meter: EnergyMeter | None = None, *, root: Path = Path("/")) -> None:
        self._meter = EnergyMeter() if meter is None else meter
        self._root = root
        self._sampled = self._told = time.monotonic()
        self._spending = Spending(self._meter, root=root)
        self._counts: dict[str, Counts] = {}

    def renew(self, entries: Mapping[str, Entry], *, period: float = PERIOD) -> None:
        """Put new figures into the reports, at most once a ``period``; to be called about every second."""
        now = time.monotonic()
        if now - self._sampled >= min(_SENSOR_PERIOD, period):
            self._sampled = now
            self._meter.sample(now)
        if now - self._told < period:
            return
        self._told = now
        spent = self._spending.so_far()
        self._spending = Spending(self._meter, root=self._root)
        totals = {name: entry.statistics.total() for name, entry in entries.items()}
        computed = {name: total.infer_ns - self._counts.get(name, Counts()).infer_ns for name, total in totals.items()}
        for name, total in totals.items():
            entry, old = entries[name], self._counts.get(name, Counts())
            calls = total.answered - old.answered
            if calls and entry.report is not None:
                share = computed[name] / max(1, sum(computed.values())) / calls
                figures = {**entry.report.figures, **_cost(*spent, share), **_hits(total)}
                figures |= _escalated(entry)
                entry.report = entry.unwritten = replace(entry.report, figures=figures)
        self._counts = totals


def _cost(seconds: float, joules: float | None, share: float) -> dict[str, float]:
    """Return what one call has cost.

    Args:
        seconds, joules: what this process has spent.
        share: of that, the part of one call.
    """
    found = {"cpu_ms_per_inference": round(1000 * seconds * share, 3)}
    return found if joules is None else {**found, "joules_per_inference": round(joules * share, 6)}


def _hits(total: Counts) -> dict[str, float]:
    looked = total.cache_hits + total.cache_misses
    return {"cache_hit_percent": round(100 * total.cache_hits / looked, 1)} if looked else {}


def _escalated(entry: Entry) -> dict[str, float]:
    counts = None if entry.model is None else entry.model.cascade
    if counts is None or not counts.items:
        return {}
    return {
        "cascade_escalated_percent": round(100 * counts.escalated / counts.items, 1),
        "cascade_away_percent": round(100 * (counts.away + counts.paused) / counts.items, 1),
    }
