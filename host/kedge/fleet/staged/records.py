"""Staged rollouts in the database: their states, members and gates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace

from kedge.fleet.database import Row, Session
from kedge.fleet.staged import policy as policies
from kedge.fleet.staged.gates import GateResult, Verdict
from kedge.fleet.staged.phases import ENDED, Phase, Step
from kedge.fleet.staged.policy import Late, Policy
from kedge.fleet.staged.states import Member, State
from kedge_protocol.errors import FleetError

GOING, OPEN, CLOSED = 2, 1, 0
"""Of ``rollout_stage.live``."""

_INSERT = """
INSERT INTO rollout_stage (rollout_id, policy, phase, paused, wave, waves, since, reason, approved, revert_id, live,
    edition)
VALUES (:id, :policy, :phase, :paused, :wave, :waves, :since, :reason, :approved, NULL, :live, 0)
"""
_UPDATE = """
UPDATE rollout_stage SET phase = :phase, paused = :paused, wave = :wave, since = :since, reason = :reason,
    approved = :approved, live = :live, edition = edition + 1 WHERE rollout_id = :id
"""
_MEMBER = """
INSERT INTO rollout_member (rollout_id, device_id, target, wave, step, told_at, moved_at, mark, tries, stage)
VALUES (:rollout, :device, :target, :wave, :step, :told_at, :moved_at, :mark, :tries, :stage)
ON CONFLICT (rollout_id, device_id) DO UPDATE SET step = excluded.step, told_at = excluded.told_at,
    moved_at = excluded.moved_at, mark = excluded.mark, tries = excluded.tries, stage = excluded.stage
"""
_GATE = """
INSERT OR REPLACE INTO gate_result
(rollout_id, wave, gate, target, verdict, figure, "limit", low, high, samples, detail, at)
VALUES (:rollout, :wave, :gate, :target, :verdict, :figure, :limit, :low, :high, :samples, :detail, :at)
"""


@dataclass(frozen=True, kw_only=True)
class Staged:
    """A staged rollout as it is stored.

    Attributes:
        row: of ``rollout``.
        revert: the rollout that takes it back; None while there is none.
        live: whether it goes on, is open for answers and newcomers, or is closed.
        edition: grows with each change.
    """

    row: Row
    policy: Policy
    state: State
    revert: int | None
    live: int
    edition: int

    @property
    def id(self) -> int:
        """The rollout's number."""
        return int(self.row["id"])


def create(session: Session, rollout: int, policy: Policy, state: State) -> None:
    """Write a new staged rollout with its members."""
    values = {"id": rollout, "policy": policies.dump(policy), "waves": state.waves}
    session.run(_INSERT, values | _columns(policy, state))
    _write_members(session, rollout, state.members)


def load(session: Session, rollout: int, *, known: Staged | None = None) -> Staged | None:
    """Return a staged rollout; None where it is a plain one, or none.

    Args:
        known: what was read of it before: members that have not changed are not read again.
    """
    stage = session.row("SELECT * FROM rollout_stage WHERE rollout_id = ?", (rollout,))
    row = session.row("SELECT * FROM rollout WHERE id = ?", (rollout,))
    if stage is None or row is None:
        return None
    if known is not None and known.edition == stage["edition"]:
        return replace(known, row=row)
    rows = session.rows("SELECT * FROM rollout_member WHERE rollout_id = ? ORDER BY rowid", (rollout,))
    state = State(
        waves=stage["waves"],
        phase=Phase(stage["phase"]),
        wave=stage["wave"],
        since=stage["since"],
        reason=stage["reason"],
        paused=bool(stage["paused"]),
        approved=stage["approved"],
        members={one["device_id"]: _member(one) for one in rows},
    )
    return Staged(
        row=row,
        policy=policies.load(stage["policy"]),
        state=state,
        revert=stage["revert_id"],
        live=stage["live"],
        edition=stage["edition"],
    )


def save(session: Session, before: Staged, after: State) -> Staged:
    """Write what changed; return it as it is now."""
    session.run(_UPDATE, {"id": before.id} | _columns(before.policy, after))
    if after.members is not before.state.members:
        known = before.state.members
        changed = {device: member for device, member in after.members.items() if known.get(device) != member}
        _write_members(session, before.id, changed)
    state = {Phase.ABORTED: "aborted", Phase.REVERTING: "aborted", Phase.SUPERSEDED: "superseded"}.get(after.phase)
    session.run("UPDATE rollout SET state = ? WHERE id = ?", (state or "active", before.id))
    return replace(before, state=after, live=_live(before.policy, after), edition=before.edition + 1)


def reverting(session: Session, staged: Staged, revert: int) -> Staged:
    """Write which rollout takes it back; return it as it is now."""
    session.run(
        "UPDATE rollout_stage SET revert_id = ?, edition = edition + 1 WHERE rollout_id = ?", (revert, staged.id)
    )
    return replace(staged, revert=revert, edition=staged.edition + 1)


def numbers(session: Session, staged: Staged, names: Iterable[str]) -> list[int]:
    """Return the numbers of members, by name.

    Raises:
        FleetError: a device is not one of them.
    """
    wanted = list(names)
    rows = session.where_in("SELECT id, name FROM device WHERE name IN {}", wanted)
    found = {row["name"]: row["id"] for row in rows if row["id"] in staged.state.members}
    if missing := [name for name in wanted if name not in found]:
        raise FleetError(f"{missing[0]!r} is not a device of it")
    return list(found.values())


def keep_gates(session: Session, rollout: int, wave: int, gates: Iterable[GateResult], now: float) -> None:
    """Write what the gates say of a wave, in place of what they said before."""
    rows = [
        {"rollout": rollout, "wave": wave, "at": now} | {one.name: getattr(gate, one.name) for one in fields(gate)}
        for gate in gates
    ]
    session.run_many(_GATE, [row | {"verdict": row["verdict"].value} for row in rows])


def gates(session: Session, rollout: int, wave: int) -> tuple[GateResult, ...]:
    """Return what the gates said last of a wave."""
    names = [one.name for one in fields(GateResult)]
    query = "SELECT * FROM gate_result WHERE rollout_id = ? AND wave = ? ORDER BY target, rowid"
    return tuple(
        GateResult(**{name: row[name] for name in names} | {"verdict": Verdict(row["verdict"])})
        for row in session.rows(query, (rollout, wave))
    )


def _columns(policy: Policy, state: State) -> dict[str, object]:
    return {
        "phase": state.phase.value,
        "paused": state.paused,
        "wave": state.wave,
        "since": state.since,
        "reason": state.reason,
        "approved": state.approved,
        "live": _live(policy, state),
    }


def _live(policy: Policy, state: State) -> int:
    if state.phase not in ENDED:
        return GOING
    if state.phase is Phase.SUPERSEDED:
        return CLOSED
    if state.phase is Phase.ABORTED:
        return OPEN if any(member.step is Step.REVERTING for member in state.members.values()) else CLOSED
    return OPEN if state.phase is Phase.INCOMPLETE or policy.late is Late.IN else CLOSED


def _member(row: Row) -> Member:
    return Member(
        target=row["target"],
        wave=row["wave"],
        step=_STEPS[row["step"]],
        told_at=row["told_at"],
        moved_at=row["moved_at"],
        mark=row["mark"],
        tries=row["tries"],
        stage=row["stage"],
    )


_STEPS = {step.value: step for step in Step}


def _write_members(session: Session, rollout: int, members: Mapping[int, Member]) -> None:
    rows = [
        {
            "rollout": rollout,
            "device": device,
            "target": member.target,
            "wave": member.wave,
            "step": member.step.value,
            "told_at": member.told_at,
            "moved_at": member.moved_at,
            "mark": member.mark,
            "tries": member.tries,
            "stage": member.stage,
        }
        for device, member in members.items()
    ]
    session.run_many(_MEMBER, rows)
