"""Collects the evidence of a staged rollout: a few bounded queries, however large the fleet and long the rollout."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kedge.fleet import drift
from kedge.fleet.database import Row, Session
from kedge.fleet.staged import shifts
from kedge.fleet.staged.cohorts import (
    CallFigures,
    CohortEvidence,
    DeviceMemory,
    DeviceShadow,
    DeviceTemperature,
    DriftFigures,
    ShadowFigures,
)
from kedge.fleet.staged.phases import Step
from kedge.fleet.staged.readings import Reading, Readings
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
SELECT target, figures.device_id, figures.digest = part.digest AS is_new, figures.digest, since, until, edition FROM (
    SELECT target, device_id, row_number() OVER (PARTITION BY target, wave ORDER BY device_id) AS place
    FROM rollout_member WHERE rollout_id = :rollout AND step NOT IN (:waiting, :gone)
) AS member
JOIN rollout_device AS part ON part.rollout_id = :rollout AND part.device_id = member.device_id
JOIN call_figures AS figures ON figures.device_id = member.device_id AND figures.model = :model
    AND figures.digest IN (part.digest, part.previous)
WHERE place <= :measured
"""
_CONTROL = """
SELECT target, figures.device_id, 0 AS is_new, figures.digest, since, until, edition FROM (
    SELECT target, device_id, row_number() OVER (PARTITION BY target ORDER BY device_id) AS place
    FROM rollout_member WHERE rollout_id = :rollout AND step = :waiting
) AS member
JOIN desired_model AS desired ON desired.device_id = member.device_id AND desired.model = :model
JOIN call_figures AS figures ON figures.device_id = member.device_id AND figures.model = :model
    AND figures.digest = desired.digest
WHERE place <= :control
"""
_NOT_REACHED = {Step.WAITING.value, Step.GONE.value}


_SHADOWED = """
SELECT member.target, figures.device_id, figures.digest, since, until, edition FROM (
    SELECT target, device_id, row_number() OVER (PARTITION BY target, wave ORDER BY device_id) AS place
    FROM rollout_member WHERE rollout_id = :rollout AND step NOT IN (:waiting, :gone)
) AS member
JOIN rollout ON rollout.id = :rollout
JOIN release ON release.name = rollout.model AND release.version = rollout.version
JOIN bundle ON bundle.release_id = release.id AND bundle.target = member.target
JOIN call_figures AS figures ON figures.device_id = member.device_id AND figures.model = :model
    AND figures.digest <> bundle.digest AND figures.shadow = bundle.digest
WHERE place <= :measured
"""
_ASKED = """
SELECT DISTINCT target FROM rollout_member JOIN desired_shadow USING (device_id)
WHERE rollout_id = :rollout AND desired_shadow.model = :model
"""
_BASELINES = "SELECT DISTINCT digest, drift FROM bundle WHERE drift IS NOT NULL AND digest IN {}"
Baselines = Mapping[str, Sequence[Stream]]


@dataclass
class _Target:
    """Readings of one target, by device name."""

    new: dict[str, Reading] = field(default_factory=dict)
    old: dict[str, Reading] = field(default_factory=dict)

    def bundles(self) -> set[str]:
        """The bundles whose figures have sketches."""
        return {one.digest for one in (*self.new.values(), *self.old.values()) if one.figures.drift}

    def drift(self, baselines: Baselines) -> DriftFigures | None:
        """The drift of the devices that have figures of both bundles, and both bundles baselines."""
        found = {}
        for name, new in self.new.items():
            old = self.old.get(name)
            if old is None or not (new.figures.drift and old.figures.drift):
                continue
            after, before = baselines.get(new.digest), baselines.get(old.digest)
            if after and before:
                found[name] = ((after, new.figures.drift), (before, old.figures.drift))
        return shifts.figures(found) if found else None


def collect(
    session: Session, rollout_id: int, *, now: float, readings: Readings | None = None
) -> tuple[CohortEvidence, ...]:
    """Return the evidence of a rollout, one cohort for each of its targets, by name.

    Args:
        session: a transaction.
        rollout_id: of a staged rollout.
        now: seconds since 1970; figures that came later are left out.
        readings: those of the last look at this rollout.
    """
    readings = Readings() if readings is None else readings
    readings.begin()
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
        found, reading = targets[row["target"]], readings.read(session, model, row)
        (found.new if row["is_new"] else found.old)[reading.device] = reading
    shadows = _shadows(session, values, now, readings)
    bundles = {digest for found in targets.values() for digest in found.bundles()}
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


def _shadows(session: Session, values: dict[str, Any], now: float, readings: Readings) -> dict[str, ShadowFigures]:
    """Return the figures of the new bundle as a shadow, by target; of targets where none is asked for and none came,
    nothing."""
    found: dict[str, list[DeviceShadow]] = {row["target"]: [] for row in session.rows(_ASKED, values)}
    for row in session.rows(_SHADOWED, values):
        reading = readings.read(session, values["model"], row)
        shadow = reading.figures.shadow
        if shadow is None or row["since"] > now:
            continue
        found.setdefault(row["target"], []).append(
            DeviceShadow(
                device=reading.device,
                compared=shadow.compared,
                classes=shadow.classes,
                confidence_shift=shadow.mean_shift,
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
        new=CallFigures(devices=tuple(one.calls for one in found.new.values())),
        old=CallFigures(devices=tuple(one.calls for one in found.old.values())),
        memory_slope=_memory(found),
        temperature_c=tuple(
            DeviceTemperature(
                device=name, new=one.temperature, old=found.old[name].temperature if name in found.old else None
            )
            for name, one in found.new.items()
        ),
        drift=found.drift(baselines),
    )


def _memory(found: _Target) -> tuple[DeviceMemory, ...]:
    growths = ((name, one.growth) for name, one in found.new.items() if one.measures_memory)
    before = ((name, found.old[name].growth_before) for name in itertools.islice(found.old, SLOPES))
    return (
        *(DeviceMemory(device=name, new=one.slope, variance=one.variance, points=one.points) for name, one in growths),
        *(DeviceMemory(device=name, old=old) for name, old in before if old is not None),
    )
