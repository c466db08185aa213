"""Collects the evidence of a staged rollout: a few bounded queries, however large the fleet and long the rollout."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kedge.fleet import call_figures, drift
from kedge.fleet.call_figures import Figures
from kedge.fleet.database import Row, Session
from kedge.fleet.staged import shifts
from kedge.fleet.staged.cohorts import (
    CallFigures,
    CohortEvidence,
    DeviceCalls,
    DeviceMemory,
    DeviceShadow,
    DeviceTemperature,
    DriftFigures,
    ShadowFigures,
)
from kedge.fleet.staged.phases import Step
from kedge.fleet.staged.slopes import MIN_SECONDS, WARM_UP_SECONDS, slope
from kedge_protocol.drift import Stream

MEASURED = 128
"""Devices of a target whose figures are read, as many of each wave: more would decide no better."""
LEAST_MEASURED = 4
"""Of each wave, however many waves there are."""
CONTROL = 32
"""Devices of a target, of those that no wave has reached, whose figures are read."""

SLOPES = 16
"""Devices whose memory with the old bundle is looked at: its median matters only."""

_COUNTS = """
SELECT target, step, stage, count(*) AS devices FROM rollout_member WHERE rollout_id = ? GROUP BY target, step, stage
"""
_WAVES = "SELECT count(DISTINCT wave) FROM rollout_member WHERE rollout_id = :rollout AND step NOT IN (:waiting, :gone)"
_SERVED = """
SELECT member.target, sum(served_calls > 0) AS calls, sum(served_calls <= 0 AND served_golden > 0) AS golden,
       count(served_calls) AS told
FROM rollout_member AS member
JOIN rollout_device AS part ON part.rollout_id = member.rollout_id AND part.device_id = member.device_id
JOIN reported_model AS model ON model.device_id = member.device_id AND model.model = :model
WHERE member.rollout_id = :rollout AND step = :serving AND model.digest = part.digest
GROUP BY member.target
"""
_SILENT = """
SELECT target, count(*) AS devices, sum(NOT coalesce(online, 0)) AS silent
FROM rollout_member LEFT JOIN device_state USING (device_id) WHERE rollout_id = :rollout AND step = :waiting
GROUP BY target
"""
_FIGURES = """
SELECT target, name, figures.digest = part.digest AS is_new, figures.digest, since, until, document FROM (
    SELECT target, device_id, row_number() OVER (PARTITION BY target, wave ORDER BY device_id) AS place
    FROM rollout_member WHERE rollout_id = :rollout AND step NOT IN (:waiting, :gone)
) AS member
JOIN rollout_device AS part ON part.rollout_id = :rollout AND part.device_id = member.device_id
JOIN (SELECT id, name FROM device) AS device ON device.id = member.device_id
JOIN call_figures AS figures ON figures.device_id = member.device_id AND figures.model = :model
    AND figures.digest IN (part.digest, part.previous)
WHERE place <= :measured
"""
_CONTROL = """
SELECT target, name, 0 AS is_new, figures.digest, since, until, document FROM (
    SELECT target, device_id, row_number() OVER (PARTITION BY target ORDER BY device_id) AS place
    FROM rollout_member WHERE rollout_id = :rollout AND step = :waiting
) AS member
JOIN (SELECT id, name FROM device) AS device ON device.id = member.device_id
JOIN desired_model AS desired ON desired.device_id = member.device_id AND desired.model = :model
JOIN call_figures AS figures ON figures.device_id = member.device_id AND figures.model = :model
    AND figures.digest = desired.digest
WHERE place <= :control
"""
_NOT_REACHED = {Step.WAITING.value, Step.GONE.value}


_SHADOWED = """
SELECT member.target, device.name, bundle.digest AS new, since, until, document FROM (
    SELECT target, device_id, row_number() OVER (PARTITION BY target, wave ORDER BY device_id) AS place
    FROM rollout_member WHERE rollout_id = :rollout AND step NOT IN (:waiting, :gone)
) AS member
JOIN (SELECT id, name FROM device) AS device ON device.id = member.device_id
JOIN rollout ON rollout.id = :rollout
JOIN release ON release.name = rollout.model AND release.version = rollout.version
JOIN bundle ON bundle.release_id = release.id AND bundle.target = member.target
JOIN call_figures AS figures ON figures.device_id = member.device_id AND figures.model = :model
    AND figures.digest <> bundle.digest
WHERE place <= :measured AND instr(document, :mark)
"""
_ASKED = """
SELECT DISTINCT target FROM rollout_member JOIN desired_shadow USING (device_id)
WHERE rollout_id = :rollout AND desired_shadow.model = :model
"""
_BASELINES = "SELECT DISTINCT digest, drift FROM bundle WHERE drift IS NOT NULL AND digest IN {}"
Baselines = Mapping[str, Sequence[Stream]]


@dataclass
class _Target:
    """Figures of one target, by device name, and the bundles that they are of."""

    new: dict[str, Figures] = field(default_factory=dict)
    old: dict[str, Figures] = field(default_factory=dict)
    bundles: dict[tuple[str, bool], str] = field(default_factory=dict)

    def drift(self, baselines: Baselines) -> DriftFigures | None:
        """The drift of the devices that have figures of both bundles, and both bundles baselines."""
        found = {}
        for name, new in self.new.items():
            after, before = (baselines.get(self.bundles.get((name, is_new), "")) for is_new in (True, False))
            if after and before and name in self.old:
                found[name] = ((after, new.drift), (before, self.old[name].drift))
        return shifts.figures(found) if found else None


def collect(session: Session, rollout_id: int, *, now: float) -> tuple[CohortEvidence, ...]:
    """Return the evidence of a rollout, one cohort for each of its targets, by name.

    Args:
        session: a transaction.
        rollout_id: of a staged rollout.
        now: seconds since 1970; figures that came later are left out.
    """
    model = session.value("SELECT model FROM rollout WHERE id = ?", (rollout_id,))
    values = {
        "rollout": rollout_id,
        "model": model,
        "waiting": Step.WAITING.value,
        "gone": Step.GONE.value,
        "serving": Step.SERVING.value,
    }
    counts: dict[str, list[Row]] = {}
    for row in session.rows(_COUNTS, (rollout_id,)):
        counts.setdefault(row["target"], []).append(row)
    served = {row["target"]: row for row in session.rows(_SERVED, values)}
    control = {row["target"]: row for row in session.rows(_SILENT, values)}
    targets = {target: _Target() for target in counts}
    waves = session.value(_WAVES, values)
    values["measured"] = max(LEAST_MEASURED, MEASURED // max(1, waves))
    measured = session.rows(_FIGURES, values)
    for row in (*measured, *session.rows(_CONTROL, values | {"control": CONTROL})):
        if row["since"] > now:
            continue
        figures = call_figures.decode(row["since"], row["until"], row["document"])
        found = targets[row["target"]]
        (found.new if row["is_new"] else found.old)[row["name"]] = figures
        if figures.drift:
            found.bundles[row["name"], bool(row["is_new"])] = row["digest"]
    shadows = _shadows(session, values, now)
    bundles = {digest for found in targets.values() for digest in found.bundles.values()}
    baselines = {
        row["digest"]: drift.read_baseline(row["drift"]) for row in session.where_in(_BASELINES, sorted(bundles))
    }
    return tuple(
        replace(
            _cohort(target, rows, served.get(target), control.get(target), targets[target], baselines),
            shadow=shadows.get(target),
        )
        for target, rows in sorted(counts.items())
    )


def _shadows(session: Session, values: dict[str, Any], now: float) -> dict[str, ShadowFigures]:
    """Return the figures of the new bundle as a shadow, by target; of targets where none is asked for and none came,
    nothing."""
    found: dict[str, list[DeviceShadow]] = {row["target"]: [] for row in session.rows(_ASKED, values)}
    for row in session.rows(_SHADOWED, {**values, "mark": call_figures.SHADOW_MARK}):
        shadow = call_figures.decode(row["since"], row["until"], row["document"]).shadow
        if shadow is None or shadow.digest != row["new"] or row["since"] > now:
            continue
        total = shadow.compared.total
        found.setdefault(row["target"], []).append(
            DeviceShadow(
                device=row["name"],
                compared=shadow.compared,
                classes=shadow.classes,
                confidence_shift=shadow.confidence_shift / total if total else None,
            )
        )
    return {target: ShadowFigures(devices=tuple(devices)) for target, devices in found.items()}


def _cohort(
    target: str,
    counts: Sequence[Row],
    served: Row | None,
    control: Row | None,
    found: _Target,
    baselines: Baselines,
) -> CohortEvidence:
    def number(*steps: Step, stage: str | None = None) -> int:
        wanted = {step.value for step in steps}
        return sum(row["devices"] for row in counts if row["step"] in wanted and stage in (None, row["stage"]))

    is_told = served is not None and served["told"]
    return CohortEvidence(
        target=target,
        devices=sum(row["devices"] for row in counts if row["step"] not in _NOT_REACHED),
        serving=number(Step.SERVING),
        failed=number(Step.FAILED),
        silent=number(Step.SILENT),
        proof_failed=number(Step.FAILED, stage="prove"),
        served_by_calls=served["calls"] or 0 if served is not None and is_told else None,
        served_by_golden=served["golden"] or 0 if served is not None and is_told else None,
        control_devices=0 if control is None else control["devices"],
        control_silent=0 if control is None else control["silent"],
        new=_calls(found.new),
        old=_calls(found.old),
        memory_slope=_memory(found),
        temperature_c=tuple(
            DeviceTemperature(device=name, new=_mean(figures), old=_mean(found.old.get(name)))
            for name, figures in found.new.items()
        ),
        drift=found.drift(baselines),
    )


def _calls(figures: dict[str, Figures]) -> CallFigures:
    return CallFigures(
        devices=tuple(
            DeviceCalls(
                device=name,
                calls=one.calls,
                p95=one.p95,
                p99=one.p99,
                buckets={int(bucket): count for bucket, count in one.buckets.items()},
            )
            for name, one in figures.items()
        )
    )


def _mean(figures: Figures | None) -> float | None:
    return None if figures is None or not figures.temperature.count else figures.temperature.mean


def _memory(found: _Target) -> tuple[DeviceMemory, ...]:
    slopes = []
    for name, figures in found.new.items():
        if not figures.memory and (figures.block is None or not figures.block.memories):
            continue
        points = [point for point in figures.memory if point[0] >= WARM_UP_SECONDS]
        long = points and points[-1][0] - points[0][0] >= MIN_SECONDS
        new, variance = slope(points) if long else (None, 0.0)
        slopes.append(DeviceMemory(device=name, new=new, variance=variance, points=len(points)))
    before = ((name, slope(found.old[name].memory)[0]) for name in itertools.islice(found.old, SLOPES))
    return (*slopes, *(DeviceMemory(device=name, old=old) for name, old in before if old is not None))
