"""Figures of running models for telemetry: processor time and energy an inference, and the shares of
kept answers and of those by a larger model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kedge_agent.serving.energy import EnergyMeter
from kedge_agent.serving.statistics import Counts

if TYPE_CHECKING:
    from kedge_agent.serving.model_pool import Entry

PERIOD = 300.0
"""Seconds between two reports that differ in figures alone: they are files on a device's flash memory."""
_SENSOR_PERIOD = 1.0


@dataclass(frozen=True)
class _Spent:
    """What this process and the machine have spent so far, in seconds and joules."""

    process: float
    machine: float | None
    joules: float | None


class RunningFigures:
    """Renews the reports of models that were called.

    Args:
        meter: reads the energy.
        root: root of the file system with ``/proc/stat``.
    """

    def __init__(self, meter: EnergyMeter | None = None, *, root: Path = Path("/")) -> None:
        self._meter = EnergyMeter() if meter is None else meter
        self._stat = root / "proc" / "stat"
        self._sampled = self._told = time.monotonic()
        self._meter.sample(self._sampled)
        self._spent = self._now_spent()
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
        before, self._spent = self._spent, self._now_spent()
        totals = {name: entry.statistics.total() for name, entry in entries.items()}
        computed = {name: total.infer_ns - self._counts.get(name, Counts()).infer_ns for name, total in totals.items()}
        for name, total in totals.items():
            entry, old = entries[name], self._counts.get(name, Counts())
            calls = total.answered - old.answered
            if calls and entry.report is not None:
                share = computed[name] / max(1, sum(computed.values())) / calls
                figures = {**entry.report.figures, **_spending(before, self._spent, share), **_hits(total)}
                figures |= _escalated(entry)
                entry.report = entry.unwritten = replace(entry.report, figures=figures)
        self._counts = totals

    def _now_spent(self) -> _Spent:
        return _Spent(time.process_time(), _busy_seconds(self._stat), self._meter.joules)


def _spending(before: _Spent, now: _Spent, share: float) -> dict[str, float]:
    """Return what one call has cost: this process's time, and of the machine's energy the part that this process's time
    is of all processes'.

    Args:
        share: of this process's time, the part of one call.
    """
    seconds = now.process - before.process
    found = {"cpu_ms_per_inference": round(1000 * seconds * share, 3)}
    if None in (before.joules, now.joules, before.machine, now.machine):
        return found
    busy = max((now.machine or 0.0) - (before.machine or 0.0), seconds)
    joules = (now.joules or 0.0) - (before.joules or 0.0)
    if busy > 0:
        found["joules_per_inference"] = round(joules * seconds / busy * share, 6)
    return found


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


def _busy_seconds(stat: Path) -> float | None:
    """Return the time that all processors have worked (``man 5 proc``: all but idle and iowait, in hundredths)."""
    try:
        fields = [int(field) for field in stat.read_text().splitlines()[0].split()[1:9]]
    except (OSError, ValueError, IndexError):
        return None
    return (sum(fields) - fields[3] - fields[4]) / 100
