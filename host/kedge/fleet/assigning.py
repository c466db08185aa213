"""Gives devices the bundle of a release that suits them, and settles what they chose.

Where a release holds one bundle for a target, a device gets that. Of several it gets the one that the fleet's figures
name, see :mod:`kedge.fleet.candidates`. Without figures a few devices are given two: they keep the better one and
report both. What a device kept becomes what its rollout wants of it, in the transaction that stores its report, so that
status, waves, gates and a way back know one bundle of each device. Others wait meanwhile, and no longer than
:data:`HOLD_SECONDS`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kedge.fleet import candidates, devices, releases, rollouts
from kedge.fleet.candidates import Assigned, Candidate, Decision
from kedge.fleet.database import Database, Row, Session, note_change
from kedge.fleet.rollouts import START, Plan, Wanted
from kedge_protocol.errors import FleetError
from kedge_protocol.messages import ModelState, Reported, ReportedCandidate, ReportedModel

HOLD_SECONDS = 600.0
"""Seconds that a device waits at most for what others of its target measure."""

_ONE = {Assigned.MEASURED.value, Assigned.GIVEN.value}
_REFUSING = {"check", "prove", "serve"}
"""Stages whose failure is the bundle's: what could not be fetched or switched to says nothing of it."""
_INSERT = """
INSERT OR REPLACE INTO assignment (rollout_id, device_id, target, state, rival, reason, soak, since)
VALUES (?, ?, ?, ?, ?, ?, ?, ?)
"""
_OPEN = """
SELECT assignment.*, part.digest, part.desired_version, model, version, rollout.state AS rollout_state FROM assignment
JOIN rollout_device AS part USING (rollout_id, device_id) JOIN rollout ON rollout.id = rollout_id
WHERE device_id = ? AND assignment.state <> 'waiting' AND superseded_by IS NULL
"""
_WAITING = """
SELECT assignment.*, model, version FROM assignment
JOIN rollout_device AS part USING (rollout_id, device_id) JOIN rollout ON rollout.id = rollout_id
WHERE assignment.state = 'waiting' AND superseded_by IS NULL AND rollout.state = 'active'
"""
_ONLINE_FIRST = """
SELECT device.id FROM device LEFT JOIN device_state ON device_id = device.id WHERE device.id IN {}
ORDER BY coalesce(online, 0) DESC, name
"""


def start(session: Session, reference: str, select_by: Mapping[str, str]) -> tuple[int, dict[str, str]]:
    """See :meth:`kedge.fleet.service.FleetService.rollout_start`; the rollout's number, and who is left out why."""
    release = releases.find(session, reference)
    chosen = devices.select_devices(session, select_by)
    if not chosen:
        labels = " ".join(f"{key}={value}" for key, value in select_by.items())
        raise FleetError(
            f"no device has the labels {labels}" if labels else "there is no device",
            remedy="See kedge device list",
        )
    found = rollouts.select(session, release, chosen)
    plan = Plan(
        model=release["name"],
        version=release["version"],
        kind=START,
        selected=json.dumps(dict(select_by)),
        parts={},
    )
    number = rollouts.create(session, plan)
    give(session, number, release, found.targets)
    rollouts.claim(session, number, plan.model, table="rollout_device")
    return number, dict(found.skipped)


def give(session: Session, rollout: int, release: Row, targets: Mapping[int, str], *, soak: float = 0.0) -> None:
    """Give devices of a rollout what suits them of a release, or let them wait.

    Args:
        targets: device's number → its target.
        soak: seconds that a device waits for calls of users before it sends golden samples to itself.
    """
    several = candidates.of_release(session, release["id"])
    by_target: dict[str, list[int]] = {}
    for device, target in targets.items():
        by_target.setdefault(target, []).append(device)
    parts: dict[int, Wanted] = {}
    for target, numbers in by_target.items():
        choice = several[target]
        if len(choice) == 1:
            parts |= dict.fromkeys(numbers, choice[0].wanted)
            continue
        known = candidates.evidence(session, release, target, choice)
        decided = candidates.decide(choice, known, _online_first(session, numbers))
        _assign(session, _Place(rollout, release["name"], target), decided, soak=dict.fromkeys(numbers, soak))
    if parts:
        rollouts.give(session, rollout, release["name"], parts, soak=soak)


def give_again(session: Session, rollout: int, numbers: Sequence[int]) -> None:
    """Ask the same of devices once more; those that wait are given what is known to suit them."""
    waiting = [row for row in session.rows(f"{_WAITING} AND rollout_id = ?", (rollout,)) if row["device_id"] in numbers]
    _let_go(session, waiting, may_wait=False)
    told = {row["device_id"] for row in waiting}
    rollouts.give_again(session, rollout, [number for number in numbers if number not in told])


@dataclass(frozen=True)
class _Place:
    """Where devices get a bundle: rollout, model, and target."""

    rollout: int
    model: str
    target: str


def _assign(session: Session, place: _Place, decided: Mapping[int, Decision], *, soak: Mapping[int, float]) -> None:
    now = session.now()
    rows = []
    for device, one in decided.items():
        rival = None if one.wanted.rival is None else one.wanted.rival.digest
        rows.append((place.rollout, device, place.target, one.state.value, rival, one.reason, soak[device], now))
    waiting = {device: one.wanted for device, one in decided.items() if one.state is Assigned.WAITING}
    if waiting:
        rollouts.hold(session, place.rollout, place.model, waiting)
    for seconds in sorted(set(soak.values())):
        told = {d: one.wanted for d, one in decided.items() if d not in waiting and soak[d] == seconds}
        if told:
            rollouts.give(session, place.rollout, place.model, told, soak=seconds)
    session.run_many(_INSERT, rows)


def _online_first(session: Session, numbers: Sequence[int]) -> list[int]:
    rows = session.where_in(_ONLINE_FIRST, list(numbers))
    return [row["id"] for row in rows]


# What devices report.


def settle(session: Session, number: int, reported: Reported) -> None:
    """Store what a device says of its candidates. What it kept becomes what its rollout wants; those that wait for its
    figures are told. A device that refused what it was given is given another one, each once."""
    for row in session.rows(_OPEN, (number,)):
        model = reported.models.get(row["model"])
        if model is None or reported.desired_version < row["desired_version"]:
            continue
        if row["state"] in _ONE:
            _lead_on(session, row, number, model)
            continue
        pair = (row["digest"], row["rival"])
        told = {one.digest: one for one in model.candidates if one.digest in pair}
        for one in told.values():
            _note_refusal(session, number, row["target"], one)
        kept, measured = _kept(model, pair, told)
        if kept is not None:
            _keep(session, row, number, kept, told if measured else {})
        elif len(told) < len(pair) or any(one.failure is None for one in told.values()):
            continue
        else:
            session.run(
                "UPDATE assignment SET state = 'refused', reason = ? WHERE rollout_id = ? AND device_id = ?",
                ("it could keep neither candidate", row["rollout_id"], number),
            )
            _give_another(session, row, number)
        others = session.rows(f"{_WAITING} AND model = ? AND assignment.target = ?", (row["model"], row["target"]))
        _let_go(session, others)


def _kept(
    model: ReportedModel, pair: tuple[str, str], told: Mapping[str, ReportedCandidate]
) -> tuple[str | None, bool]:
    """Return the bundle that a device kept, and whether it measured: an older agent takes the first without that."""
    kept = next((digest for digest, one in told.items() if one.kept), None)
    if kept is not None or told or model.state is not ModelState.SERVING or model.digest not in pair:
        return kept, True
    return model.digest, False


def _keep(session: Session, row: Row, number: int, kept: str, told: Mapping[str, ReportedCandidate]) -> None:
    other = row["rival"] if kept == row["digest"] else row["digest"]
    size = session.value("SELECT size FROM bundle WHERE digest = ?", (kept,))
    version = rollouts.next_versions(session, [number])[number]
    values = {"device": number, "rollout": row["rollout_id"], "kept": kept, "other": other, "version": version}
    backends = {
        one["digest"]: one["backend"]
        for one in session.where_in("SELECT digest, backend FROM bundle WHERE digest IN {}", [kept, other])
    }
    values |= {
        "model": row["model"],
        "size": size,
        "state": (Assigned.MEASURED if told else Assigned.GIVEN).value,
        "reason": _told(told, backends) or "its agent measures no candidates",
    }
    session.run(
        "UPDATE rollout_device SET digest = :kept, desired_version = :version"
        " WHERE rollout_id = :rollout AND device_id = :device",
        values,
    )
    session.run(
        "UPDATE desired_model SET digest = :kept, size = :size, rival = NULL, rival_size = 0"
        " WHERE device_id = :device AND model = :model",
        values,
    )
    session.run("UPDATE device SET desired_version = :version WHERE id = :device", values)
    session.run(
        "UPDATE assignment SET state = :state, rival = :other, reason = :reason"
        " WHERE rollout_id = :rollout AND device_id = :device",
        values,
    )
    note_change(session)


def _lead_on(session: Session, row: Row, number: int, model: ReportedModel) -> None:
    """Give a device another bundle if it refused the one that it was given."""
    failure = model.failure
    if model.state is not ModelState.FAILED or failure is None or failure.digest != row["digest"]:
        return
    if failure.stage in _REFUSING:
        _note_refusal(session, number, row["target"], ReportedCandidate(digest=failure.digest, failure=failure))
        _give_another(session, row, number)


def _give_another(session: Session, row: Row, number: int) -> None:
    if row["rollout_state"] != rollouts.ACTIVE:
        return
    release = releases.by_name(session, row["model"], row["version"])
    several = () if release is None else candidates.of_release(session, release["id"]).get(row["target"], ())
    refused = {
        one["bundle"] for one in session.rows("SELECT bundle FROM refused_bundle WHERE device_id = ?", (number,))
    }
    left = [one for one in several if one.digest not in refused]
    if release is None or not left:
        return
    known = candidates.evidence(session, release, row["target"], several)
    decided = candidates.decide(left, known, [number], may_wait=False)
    _assign(session, _Place(row["rollout_id"], row["model"], row["target"]), decided, soak={number: row["soak"]})


def _told(told: Mapping[str, ReportedCandidate], backends: Mapping[str, str]) -> str:
    said = []
    for digest, one in told.items():
        if one.failure is not None:
            said.append(f"{backends.get(digest)} was refused ({one.failure.stage})")
        elif one.latency is not None:
            said.append(f"{backends.get(digest)} {one.latency.p50_ms:.3g} ms here")
    return ", ".join(said)


def _note_refusal(session: Session, number: int, target: str, one: ReportedCandidate) -> None:
    if one.failure is not None and one.failure.stage in _REFUSING:
        session.run(
            "INSERT OR REPLACE INTO refused_bundle VALUES (?, ?, ?, ?, ?, ?)",
            (number, one.digest, target, one.failure.stage, one.failure.reason, session.now()),
        )
    elif one.failure is None:
        session.run("DELETE FROM refused_bundle WHERE device_id = ? AND bundle = ?", (number, one.digest))


# Devices that wait.


def tick(database: Database, now: float) -> None:
    """Tell devices that have waited long enough for the figures of others."""
    with database.read() as session:
        due = [row for row in session.rows(_WAITING) if now - row["since"] >= HOLD_SECONDS]
    if due:
        with database.write() as session:
            due = [row for row in session.rows(_WAITING) if now - row["since"] >= HOLD_SECONDS]
            _let_go(session, due, may_wait=False)


def _let_go(session: Session, waiting: Sequence[Row], *, may_wait: bool = True) -> None:
    """Give waiting devices what suits them by now; those for which figures are still to come wait on."""
    groups: dict[tuple[int, str], list[Row]] = {}
    for row in waiting:
        groups.setdefault((row["rollout_id"], row["target"]), []).append(row)
    for (rollout, target), rows in groups.items():
        release = releases.by_name(session, rows[0]["model"], rows[0]["version"])
        several: Sequence[Candidate] = ()
        if release is not None:
            several = candidates.of_release(session, release["id"]).get(target, ())
        if release is None or not several:
            continue
        known = candidates.evidence(session, release, target, several)
        numbers = _online_first(session, [row["device_id"] for row in rows])
        decided = candidates.decide(several, known, numbers, may_wait=may_wait)
        soak = {row["device_id"]: row["soak"] for row in rows}
        told = {device: one for device, one in decided.items() if one.state is not Assigned.WAITING}
        _assign(session, _Place(rollout, release["name"], target), told, soak=soak)
