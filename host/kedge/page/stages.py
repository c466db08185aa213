"""What a staged rollout's page shows: waves, gates with their evidence as plots, and what may be done with it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kedge.fleet.audit import AuditEntry
from kedge.fleet.results import StageView
from kedge.fleet.staged.gates import GateResult, Verdict
from kedge.fleet.staged.phases import ENDED, Phase, Step
from kedge.fleet.staged.policy import OnAbort
from kedge.fleet.units import size_text

WIDTH = 200.0
"""Width of a gate's plot in the SVG's units."""
_TITLES = {
    "golden": "Golden vectors: devices that refused it",
    "failures": "Failures: devices on which it failed otherwise",
    "silence": "Silence: devices that did not answer in time",
    "served": "Served: devices that answered with it",
    "error_rate": "Errors: share of calls that fail more than before",
    "p95_ratio": "Latency, p95: ratio to the old bundle",
    "p99_ratio": "Latency, p99: ratio to the old bundle",
    "first_token_ratio": "First token, p95: ratio to the old bundle",
    "memory_per_minute": "Memory: growth a minute",
    "temperature": "Temperature: hottest device",
    "agreement": "Shadow: share of inputs answered as before",
    "drift": "Drift: shift of outputs above the inputs'",
}
_SHARES = {"golden", "failures", "silence", "served", "error_rate", "agreement"}
_FLOORS = {"served", "agreement"}
_WORST = (Verdict.FAIL, Verdict.UNDECIDED, Verdict.PASS)
_STEP_ORDER = (
    Step.SERVING,
    Step.UPDATING,
    Step.SHADOWING,
    Step.WAITING,
    Step.REVERTING,
    Step.REVERTED,
    Step.GONE,
    Step.SILENT,
    Step.FAILED,
)


@dataclass(frozen=True)
class Interval:
    """A plot of one figure: places on a scale that all targets of a gate share, from 0 to :data:`WIDTH`."""

    limit: float
    figure: float
    low: float
    high: float


@dataclass(frozen=True)
class GateRow:
    """A gate's result for one target, in words and as a plot."""

    result: GateResult
    figure: str
    limit: str
    interval: Interval | None
    label: str


@dataclass(frozen=True)
class GateView:
    """A gate over all targets."""

    name: str
    title: str
    verdict: Verdict
    limit: str
    counts: dict[str, int]
    rows: tuple[GateRow, ...]


@dataclass(frozen=True)
class Action:
    """A verb that may be used now: of its route, on its button, and what it asks before."""

    verb: str
    button: str
    question: str
    danger: bool = False


@dataclass(frozen=True)
class Event:
    """An entry of the audit log as it is shown."""

    at: float
    actor: str
    action: str
    evidence: str


def gate_views(results: Iterable[GateResult]) -> tuple[GateView, ...]:
    """Group results by gate, those that fail first, then the undecided ones."""
    found: dict[str, list[GateResult]] = {}
    for result in results:
        found.setdefault(result.gate, []).append(result)
    views = [_gate(name, some) for name, some in found.items()]
    return tuple(sorted(views, key=lambda view: _WORST.index(view.verdict)))


def _gate(name: str, results: Sequence[GateResult]) -> GateView:
    counts = {
        verdict.value: count for verdict in _WORST if (count := sum(result.verdict is verdict for result in results))
    }
    scale = _scale(name, results)
    limit = f"{'at least' if name in _FLOORS else 'at most'} {figure_text(name, results[0].limit)}"
    return GateView(
        name=name,
        title=_TITLES.get(name, name),
        verdict=Verdict(next(iter(counts))),
        limit=limit,
        counts=counts,
        rows=tuple(_row(name, result, scale, limit) for result in results),
    )


def _row(name: str, result: GateResult, scale: tuple[float, float], limit: str) -> GateRow:
    figure = figure_text(name, result.figure)
    label = f"{result.target}: {figure}, {limit}, {result.verdict.value}"
    if result.low is not None and result.high is not None:
        label = (
            f"{result.target}: {figure}, between {figure_text(name, result.low)} and"
            f" {figure_text(name, result.high)}, {limit}, {result.verdict.value}"
        )
    return GateRow(result, figure, figure_text(name, result.limit), _interval(result, scale), label)


def _scale(name: str, results: Sequence[GateResult]) -> tuple[float, float]:
    """The ends of a scale with the limit and all figures; intervals that are very wide are cut off."""
    values = [result.limit for result in results]
    values += [result.figure for result in results if result.figure is not None]
    low, high = min(values), max(values)
    low = min(low, 1.0 if name.endswith("_ratio") else low if name in _FLOORS else 0.0)
    high = 1.0 if name in _FLOORS else high
    margin = 0.15 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin


def _interval(result: GateResult, scale: tuple[float, float]) -> Interval | None:
    if result.figure is None:
        return None
    start, end = scale

    def place(value: float) -> float:
        return round(min(1.0, max(0.0, (value - start) / (end - start))) * WIDTH, 1)

    low = result.figure if result.low is None else result.low
    high = result.figure if result.high is None else result.high
    return Interval(place(result.limit), place(result.figure), place(low), place(high))


def figure_text(name: str, value: float | None) -> str:
    """Return a gate's figure with its unit."""
    if value is None:
        return "not measured"
    if name in _SHARES:
        return f"{100 * value:.3g} %"
    if name.endswith("_ratio"):
        return f"×{value:.3g}"
    if name == "memory_per_minute":
        return f"{'−' if value < 0 else ''}{size_text(int(abs(value)))}/min"
    return f"{value:.3g} °C" if name == "temperature" else f"{value:.3g}"


def ordered(steps: Mapping[str, int]) -> dict[str, int]:
    """Return counts by step in the order in which they are drawn."""
    return {step.value: steps[step.value] for step in _STEP_ORDER if steps.get(step.value)}


def actions(rollout: int, stage: StageView) -> tuple[Action, ...]:
    """Return what may be done now."""
    found = []
    goes_on = stage.phase not in ENDED and stage.phase is not Phase.REVERTING
    if goes_on and stage.paused:
        found.append(Action("resume", "Resume…", f"Rollout {rollout} goes on."))
    elif goes_on:
        text = "Nothing new begins; devices that were told go on, and the gates go on watching."
        found.append(Action("pause", "Pause…", text))
    if stage.phase in (Phase.SHADOWING, Phase.RUNNING, Phase.SOAKING, Phase.HOLDING) and not stage.paused:
        text = "The next wave begins now, whatever soak time and open gates say."
        found.append(Action("promote", "Promote…", text))
    late = stage.steps.get(Step.FAILED.value, 0) + stage.steps.get(Step.SILENT.value, 0)
    if late and stage.phase not in (Phase.REVERTING, Phase.ABORTED, Phase.SUPERSEDED):
        found.append(Action("retry", "Retry…", f"{late} devices that failed or are silent are told again."))
    back = "go back to their previous bundle"
    if goes_on:
        then = back if stage.policy.on_abort is OnAbort.REVERT else "keep the new bundle"
        text = f"No further device is told, and those that were told {then}."
        found.append(Action("abort", "Abort…", text, danger=True))
    elif stage.phase in (Phase.DONE, Phase.INCOMPLETE):
        found.append(Action("revert", "Revert…", f"All devices that it reached {back}.", danger=True))
    return tuple(found)


def events(entries: Iterable[AuditEntry]) -> tuple[Event, ...]:
    """Return entries of the audit log, newest first, with their evidence in one line each."""
    return tuple(Event(entry.at, entry.actor, entry.action, _evidence(entry.evidence)) for entry in entries)


def _evidence(values: object) -> str:
    if not isinstance(values, dict):
        return ""
    shown = {key: value for key, value in values.items() if key != "policy" and value not in (None, "", [], {})}
    text = ", ".join(f"{key}: {_short(value)}" for key, value in shown.items())
    return text if len(text) <= 400 else text[:399] + "…"


def _short(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
