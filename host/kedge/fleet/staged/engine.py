"""Carries staged rollouts on: reads the facts of each, lets :mod:`.machine` decide, and writes the decision.

A decision, what it asks of devices, and its entry in the audit log are one transaction. Whoever dies before it is
committed has changed nothing; whoever dies after it finds it done. So it may be killed at any moment, and it may run in
several processes: each decides on what it reads under the write lock.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kedge.fleet import assigning, audit, candidates, releases, rollout_status, rollouts
from kedge.fleet.candidates import Assigned
from kedge.fleet.database import Database, Row, Session
from kedge.fleet.device_progress import Standing
from kedge.fleet.inbox import SeldomLog
from kedge.fleet.results import Progress
from kedge.fleet.staged import choice, evidence, gates, machine, orders, records
from kedge.fleet.staged.gates import GateResult
from kedge.fleet.staged.phases import Phase
from kedge.fleet.staged.policy import Busy, Late, OnAbort
from kedge.fleet.staged.readings import Readings
from kedge.fleet.staged.records import GOING, OPEN, Staged
from kedge.fleet.staged.states import Action, Answer, Claim, Facts, Note, Revert, Send, Shadow, Sight, State, Unshadow
from kedge_protocol import codec
from kedge_protocol.errors import FleetError, KedgeError, StorageError

GATE_SECONDS = 5.0
"""Between two looks at the evidence of a rollout."""
SELDOM_SECONDS = 10.0
"""Between two looks for devices that come late, and at rollouts that have ended."""
NAMED = 50
"""Devices that an entry of the audit log names."""

_GOING = "AND EXISTS (SELECT 1 FROM rollout_member AS one WHERE one.rollout_id = {staged} AND one.device_id = device.id"
_ASKED = """
 AND (one.step IN ('updating', 'failed', 'silent')
      OR one.step = 'serving' AND (part.superseded_by IS NOT NULL OR told.state = 'failed')))
"""
_REVERTING = " AND one.step = 'reverting')"
_IN_THE_WAY = """
SELECT DISTINCT other.rollout_id FROM rollout_member AS own
JOIN rollout_member AS other ON other.device_id = own.device_id AND other.rollout_id < own.rollout_id
JOIN rollout_stage ON rollout_stage.rollout_id = other.rollout_id AND live = 2
JOIN rollout ON rollout.id = other.rollout_id AND model = ?
WHERE own.rollout_id = ? AND own.step <> 'gone' AND other.step NOT IN ('gone', 'reverted') ORDER BY 1
"""


@dataclass
class _Looks:
    """When a rollout's gates, and its late devices, were looked at last, and what was seen then."""

    gates: float = -math.inf
    seldom: float = -math.inf
    told: tuple[GateResult, ...] = ()
    staged: Staged | None = None
    readings: Readings = field(default_factory=Readings)


class Engine:
    """Carries the staged rollouts of a fleet on.

    Args:
        database: of the fleet.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._looks: dict[int, _Looks] = {}
        self._seldom = SeldomLog()

    def tick(self, *, now: float, listening_since: float = 0.0) -> None:
        """Run one round of each rollout that goes on. A rollout that cannot go on is logged, and keeps no other one
        from going on.

        Args:
            now: seconds since 1970, by the fleet's clock.
            listening_since: since when devices have been listened to without a break: silence before is not theirs.

        Raises:
            StorageError: the database does not answer.
        """
        with self._database.read() as session:
            rows = session.rows("SELECT rollout_id, live FROM rollout_stage WHERE live > 0 ORDER BY rollout_id")
        for row in rows:
            looks = self._looks.setdefault(row["rollout_id"], _Looks())
            if row["live"] == OPEN and now - looks.seldom < SELDOM_SECONDS:
                continue
            try:
                self._go_on(row["rollout_id"], looks, now, listening_since)
            except StorageError:
                raise
            except KedgeError as error:
                number = row["rollout_id"]
                self._seldom.warning(f"rollout {number}", "rollout %s cannot go on: %s", number, error)

    def _go_on(self, rollout: int, looks: _Looks, now: float, listening_since: float) -> None:
        seldom = now - looks.seldom >= SELDOM_SECONDS
        judged = now - looks.gates >= GATE_SECONDS
        with self._database.read() as session:
            staged = looks.staged = records.load(session, rollout, known=looks.staged)
            found_gates = _gates(session, staged, now, looks.readings) if judged else None
            found = _round(session, staged, found_gates, now, listening_since, seldom=seldom)
        if found is not None and not found.is_news and found.gates and found.gates != looks.told:
            with self._database.write() as session:
                found.keep_gates(session, now)
        elif found is not None and found.is_news:
            with self._database.write() as session:
                staged = records.load(session, rollout, known=looks.staged)
                if judged and staged is not None and staged.edition != found.staged.edition:
                    # A person's order came in between.
                    found_gates = _gates(session, staged, now, looks.readings)
                found = _round(session, staged, found_gates, now, listening_since, seldom=seldom)
                if found is not None:
                    staged = found.write(session, now)
            looks.staged = staged
        if seldom:
            looks.seldom = now
        if found is not None and found.gates is not None:
            looks.gates, looks.told = now, found.gates


@dataclass(frozen=True)
class _Round:
    """One round: what it found, and what it decided."""

    staged: Staged
    state: State
    actions: tuple[Action, ...]
    gates: tuple[GateResult, ...] | None

    @property
    def is_news(self) -> bool:
        return self.state is not self.staged.state or bool(self.actions)

    def keep_gates(self, session: Session, now: float) -> None:
        """Write what the gates said, if they looked."""
        if self.gates:
            records.keep_gates(session, self.staged.id, self.staged.state.wave, self.gates, now)

    def write(self, session: Session, now: float) -> Staged:
        """Write what the gates said and what was decided; return the rollout as it is now."""
        self.keep_gates(session, now)
        return apply(session, self.staged, self.state, self.actions) if self.is_news else self.staged


def _round(
    session: Session,
    staged: Staged | None,
    found: tuple[GateResult, ...] | None,
    now: float,
    listening_since: float,
    *,
    seldom: bool,
) -> _Round | None:
    if staged is None or not staged.live:
        return None
    facts = Facts(
        seen=_seen(session, staged, now),
        gates=found,
        in_the_way=_in_the_way(session, staged),
        newcomers=_newcomers(session, staged) if seldom else {},
        listening_since=listening_since,
    )
    after, actions = machine.advance(staged.policy, staged.state, facts, now)
    return _Round(staged, after, actions, found)


def _gates(session: Session, staged: Staged | None, now: float, readings: Readings) -> tuple[GateResult, ...] | None:
    """Judge a wave that runs or soaks; None where there is none."""
    if staged is None or staged.live != GOING:
        return None
    state = staged.state
    if not state.wave or state.phase is Phase.REVERTING:
        return None
    soaked = state.phase is Phase.HOLDING or (state.phase is Phase.SOAKING and now - state.since >= staged.policy.soak)
    cohorts = evidence.collect(session, staged.id, now=now, readings=readings)
    waited = soaked and (state.phase is Phase.HOLDING or now - state.since >= staged.policy.longest_soak)
    return gates.judge(staged.policy.gates, cohorts, soaked=soaked, waited=waited)


def _seen(session: Session, staged: Staged, now: float) -> dict[int, Sight]:
    going = _GOING.format(staged=staged.id)
    seen = {}
    if staged.revert is not None:
        revert = rollouts.find(session, staged.revert)
        seen = _sights(rollout_status.standings(session, revert, going + _REVERTING), now)
    return seen | _sights(rollout_status.standings(session, staged.row, going + _ASKED), now)


def _sights(found: Sequence[tuple[Row, Standing]], now: float) -> dict[int, Sight]:
    return {row["id"]: _sight(row, standing, now) for row, standing in found}


def _sight(row: Row, standing: Standing, now: float) -> Sight:
    answers = row["answered"] is not None and row["answered"] >= row["desired_version"]
    if row["assigned"] == Assigned.WAITING.value:
        # It is not told yet; that it will be is no silence of its own.
        return Sight(answer=_ANSWERS.get(standing.progress, Answer.UNDER_WAY), mark=f"waits {now:.0f}")
    mark = f"{row['state']} {row['blocks_done']} {row['bytes_received']}" if answers else ""
    stage = (row["failure_stage"] or "") if standing.progress is Progress.FAILED else ""
    answer = _ANSWERS.get(standing.progress, Answer.UNDER_WAY)
    if standing.progress is Progress.PROVING and rollout_status.waits_for_calls(row):
        # It serves; within the soak time the gates wait for what attests it.
        answer = Answer.SERVES
    return Sight(answer=answer, mark=mark, stage=stage)


_ANSWERS = {
    Progress.DONE: Answer.SERVES,
    Progress.FAILED: Answer.FAILED,
    Progress.CONFLICT: Answer.FAILED,
    Progress.SUPERSEDED: Answer.GONE,
}


def _in_the_way(session: Session, staged: Staged) -> tuple[int, ...]:
    if staged.state.phase is not Phase.QUEUED or staged.policy.busy is not Busy.QUEUE:
        return ()
    return tuple(row[0] for row in session.rows(_IN_THE_WAY, (staged.row["model"], staged.id)))


def _newcomers(session: Session, staged: Staged) -> dict[int, str]:
    if staged.policy.late is not Late.IN or staged.state.phase in (Phase.REVERTING, Phase.ABORTED):
        return {}
    return choice.newcomers(session, staged.policy, staged.row, staged.state.members)


def apply(
    session: Session,
    before: Staged,
    after: State,
    actions: Sequence[Action],
    *,
    actor: str = audit.CONTROLLER,
) -> Staged:
    """Write a decision in the caller's transaction.

    Args:
        actor: for the audit log.

    Returns:
        The rollout as it is now; its ``revert`` is another one where this decision begins one.

    Raises:
        FleetError: a person asked to take back what was removed. By itself a rollout then keeps what its devices have.
    """
    revert = next((action for action in actions if isinstance(action, Revert)), None)
    if revert is not None and actor == audit.CONTROLLER:
        try:
            rollouts.check_previous(session, before.row, revert.devices)
        except FleetError as error:
            reason = f"{after.reason}; it cannot be taken back: {error.what}"
            after, actions = orders.abort(before.policy, before.state, after.since, reason=reason, how=OnAbort.KEEP)
    saved = records.save(session, before, after)
    for action in actions:
        if isinstance(action, Note):
            values = _named(session, action.evidence)
            audit.append(session, actor, action.action, f"rollout {before.id}", values)
        elif isinstance(action, Send):
            _send(session, before, after, action.devices)
        elif isinstance(action, Shadow):
            bundles = candidates.best_of_release(session, _release(session, before.row))
            shadows = {device: bundles[after.members[device].target] for device in action.devices}
            rollouts.shadow(
                session,
                before.row["model"],
                shadows,
                share=before.policy.shadow,
                memory_bytes=before.policy.shadow_memory_mib << 20,
            )
        elif isinstance(action, Unshadow):
            rollouts.unshadow(session, before.row["model"], action.devices)
        elif isinstance(action, Claim):
            rollouts.claim(session, before.id, before.row["model"], table="rollout_member")
        else:
            begun = rollouts.take_back(session, before.row, rollouts.own_parts(session, before.id, action.devices))
            saved = records.reverting(session, saved, begun)
    return saved


def _send(session: Session, before: Staged, after: State, numbers: Sequence[int]) -> None:
    told = {part["device_id"] for part in rollouts.own_parts(session, before.id, numbers)}
    new = {device: after.members[device].target for device in numbers if device not in told}
    if new:
        assigning.give(session, before.id, _release(session, before.row), new, soak=before.policy.soak)
    if told:
        assigning.give_again(session, before.id, sorted(told))


def _release(session: Session, rollout: Row) -> Row:
    return releases.find(session, f"{rollout['model']}:{rollout['version']}")


def _named(session: Session, values: Mapping[str, object]) -> dict[str, object]:
    """Make an entry's evidence readable: devices by name, and numbers that JSON can hold."""
    found = dict(values)
    if isinstance(numbers := found.get("devices"), list):
        rows = session.where_in("SELECT name FROM device WHERE id IN {} ORDER BY name", numbers[:NAMED])
        found |= {"devices": [row["name"] for row in rows], "count": len(numbers)}
    return {key: _finite(codec.unstructure(value)) for key, value in found.items()}


def _finite(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list) else value
