"""Tells where staged rollouts stand."""

from __future__ import annotations

from dataclasses import dataclass

from kedge.fleet.database import Row, Session
from kedge.fleet.results import StageView, WaveView
from kedge.fleet.staged import policy as policies
from kedge.fleet.staged import records
from kedge.fleet.staged.phases import ENDED, Phase, Step
from kedge.fleet.staged.policy import Policy
from kedge.fleet.staged.times import moment_text

_STEPS = """
SELECT wave, step, count(*) AS devices FROM rollout_member WHERE rollout_id = ? GROUP BY wave, step ORDER BY wave, step
"""


@dataclass(frozen=True)
class MemberView:
    """A device in a staged rollout."""

    wave: int
    step: Step


def members(session: Session, rollout: int, *, silent: bool = False) -> dict[int, MemberView]:
    """Return the devices of a staged rollout, by number.

    Args:
        silent: only those that did not answer in time.
    """
    query = "SELECT device_id, wave, step FROM rollout_member WHERE rollout_id = ? AND (step = 'silent' OR NOT ?)"
    return {
        row["device_id"]: MemberView(row["wave"], Step(row["step"])) for row in session.rows(query, (rollout, silent))
    }


def view(session: Session, rollout: int) -> StageView | None:
    """Return where a staged rollout stands; None of a plain one."""
    row = session.row("SELECT * FROM rollout_stage WHERE rollout_id = ?", (rollout,))
    return None if row is None else _view(session, row)


def _view(session: Session, row: Row) -> StageView:
    waves: dict[int, dict[str, int]] = {}
    steps: dict[str, int] = {}
    for one in session.rows(_STEPS, (row["rollout_id"],)):
        waves.setdefault(one["wave"], {})[one["step"]] = one["devices"]
        steps[one["step"]] = steps.get(one["step"], 0) + one["devices"]
    policy = policies.load(row["policy"])
    return StageView(
        phase=Phase(row["phase"]),
        paused=bool(row["paused"]),
        wave=row["wave"],
        since=row["since"],
        reason=row["reason"] or _awaited(Phase(row["phase"]), policy, session.now()),
        reverted_by=row["revert_id"],
        steps=steps,
        planned=row["waves"],
        waves=tuple(WaveView(number=wave, devices=sum(some.values()), steps=some) for wave, some in waves.items()),
        gates=records.gates(session, row["rollout_id"], row["wave"]),
        policy=policy,
    )


def _awaited(phase: Phase, policy: Policy, now: float) -> str:
    """Return which time is awaited before devices are told; empty for none."""
    if phase is Phase.SCHEDULED:
        return f"it begins at {moment_text(policy.not_before)}"
    if phase in (Phase.SHADOWING, Phase.RUNNING) and policy.window is not None and not policy.window.is_open(now):
        return f"no device is told outside of its window, {policy.window}"
    return ""


def has_ended(stage: StageView) -> bool:
    """Return whether waiting longer is pointless."""
    return stage.phase in ENDED
