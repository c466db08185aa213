"""Decides what a staged rollout does next. It knows no clock and no database: :func:`advance` takes the state, what is
known, and the time, and returns the new state with the actions that must be written with it, all or none.

A device is told once for each try: it leaves :attr:`Step.WAITING` with the action that tells it, in one transaction.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from kedge.fleet.staged.gates import GateResult, Verdict
from kedge.fleet.staged.phases import ENDED, Phase, Step
from kedge.fleet.staged.policy import Approval, OnAbort, Policy, Undecided
from kedge.fleet.staged.states import (
    Action,
    Answer,
    Claim,
    Facts,
    Member,
    Note,
    Revert,
    Send,
    Shadow,
    Sight,
    State,
    Unshadow,
)

REFUSED_STAGES = ("check", "prove")
"""A bundle that fails there fails there again: such a device is not tried again by itself."""
SPAN_SECONDS = 60.0
"""Over which ``per_minute`` counts."""


def advance(policy: Policy, state: State, facts: Facts, now: float) -> tuple[State, tuple[Action, ...]]:
    """Return the next state and what must be done with it. Equal arguments give equal results; without news and without
    a time that has come, the state is the same and nothing is to be done."""
    turn = Turn(policy, state, facts, now)
    turn.run()
    return turn.result()


AGREEMENT = "agreement"
"""The gate that judges shadows."""
_NO_SHADOW = GateResult(
    gate=AGREEMENT,
    target="each target",
    verdict=Verdict.UNDECIDED,
    figure=None,
    limit=0.0,
    samples=0,
    detail="no shadow has compared anything yet",
)


class Turn:
    """One round of a rollout, or one order of a person.

    Args:
        policy, state, facts, now: as of :func:`advance`.
    """

    def __init__(self, policy: Policy, state: State, facts: Facts, now: float) -> None:
        self.policy = policy
        self.state = state
        self.facts = facts
        self.now = now
        self.members = dict(state.members)
        self.actions: list[Action] = []

    def result(self) -> tuple[State, tuple[Action, ...]]:
        """The new state and the actions."""
        changed = self.members != self.state.members
        return replace(self.state, members=self.members) if changed else self.state, tuple(self.actions)

    def run(self) -> None:
        """Run a round."""
        self._look()
        if self.state.phase not in ENDED and self._is_gone():
            return
        if self.state.phase is Phase.REVERTING:
            self._watch_reverting()
        elif self.state.phase in ENDED:
            self._watch_ended()
        else:
            self._go_on()

    def enter(self, phase: Phase, reason: str = "", **changed: int) -> None:
        """Enter a phase."""
        self.state = replace(self.state, phase=phase, since=self.now, reason=reason, **changed)  # type: ignore[arg-type]

    def note(self, action: str, **evidence: object) -> None:
        """Note an entry for the audit log."""
        self.actions.append(Note(action, {"wave": self.state.wave, **evidence}))

    def abort(self, reason: str, how: OnAbort, **evidence: object) -> None:
        """Stop; devices that were reached go back, or keep what they have."""
        reached = tuple(device for device, member in self.members.items() if member.reached)
        self.state = replace(self.state, paused=False)
        self._end_shadows()
        self.note("rollout.abort", reason=reason, on_abort=how.value, devices=len(reached), **evidence)
        if how is OnAbort.KEEP or not reached:
            self.enter(Phase.ABORTED, reason)
            return
        for device in reached:
            self._set(device, step=Step.REVERTING, told_at=self.now, moved_at=self.now)
        self.actions.append(Revert(reached))
        self.enter(Phase.REVERTING, reason)

    def promote(self, why: str) -> None:
        """Begin the next wave, or end after the last."""
        self.note("rollout.promote", why=why, counts=self._counts())
        if self.state.phase is Phase.SHADOWING or self._in(Step.SHADOWING):
            self._end_shadows()
            self.enter(Phase.RUNNING)
        elif self.state.wave >= self.state.waves:
            self._end()
        else:
            self._begin_wave()

    def retry(self, devices: Iterable[int]) -> tuple[int, ...]:
        """Tell devices again, as soon as the limits allow it."""
        chosen = tuple(device for device in devices if self.members[device].step in (Step.FAILED, Step.SILENT))
        for device in chosen:
            self._set(device, step=Step.WAITING, tries=0, stage="")
        return chosen

    # What the devices show.

    def _look(self) -> None:
        overdue = []
        for device, sight in self.facts.seen.items():
            member = self.members.get(device)
            if member is None or member.step in (Step.WAITING, Step.SHADOWING, Step.GONE, Step.REVERTED):
                continue
            if member.step is Step.REVERTING:
                self._see_reverting(device, sight)
            else:
                self._see(device, member, sight)
                if self.members[device].step is Step.SILENT and member.step is not Step.SILENT:
                    overdue.append(device)
        if overdue:
            self.note("rollout.silent", devices=overdue)

    def _see(self, device: int, member: Member, sight: Sight) -> None:
        if sight.answer == Answer.GONE:
            self._set(device, step=Step.GONE)
        elif sight.answer == Answer.SERVES:
            if member.step is not Step.SERVING:
                self._set(device, step=Step.SERVING, moved_at=self.now, stage="")
        elif sight.answer == Answer.FAILED:
            self._see_failed(device, member, sight)
        elif member.step is Step.UPDATING:
            if self.now - member.told_at > self.policy.deadline or self._is_overdue(member, sight):
                self._set(device, step=Step.SILENT)
            elif sight.mark != member.mark and self.now - member.moved_at > self.policy.progress_timeout / 4:
                # Not with each block: each change is written.
                self._set(device, moved_at=self.now, mark=sight.mark)

    def _is_overdue(self, member: Member, sight: Sight) -> bool:
        heard = max(member.moved_at, member.told_at, self.facts.listening_since)
        return sight.mark == member.mark and self.now - heard > self.policy.progress_timeout

    def _see_failed(self, device: int, member: Member, sight: Sight) -> None:
        if member.step is not Step.FAILED:
            self._set(device, step=Step.FAILED, moved_at=self.now, stage=sight.stage)
            return
        again = sight.stage and sight.stage not in REFUSED_STAGES and member.tries <= self.policy.retries
        if again and self.state.phase not in ENDED and self.now - member.moved_at >= self.policy.retry_after:
            self._set(device, step=Step.WAITING)

    def _see_reverting(self, device: int, sight: Sight) -> None:
        if sight.answer == Answer.GONE:
            self._set(device, step=Step.GONE)
        elif sight.answer == Answer.SERVES:
            self._set(device, step=Step.REVERTED, moved_at=self.now)
        elif sight.answer == Answer.FAILED:
            self._set(device, step=Step.FAILED, moved_at=self.now, stage=sight.stage)

    def _is_gone(self) -> bool:
        if self.state.phase is Phase.REVERTING or any(m.step is not Step.GONE for m in self.members.values()):
            return False
        self.enter(Phase.SUPERSEDED, "no device is left to it")
        self.note("rollout.superseded")
        return True

    # Forward.

    def _go_on(self) -> None:
        self._take_in()
        if failed := [gate for gate in self._gates() or () if gate.verdict is Verdict.FAIL]:
            self.abort("; ".join(_told(gate) for gate in failed), self.policy.on_abort, gates=failed)
            return
        if self.state.paused:
            return
        if self.state.phase is Phase.QUEUED:
            self._wait_turn()
        if self.state.phase is Phase.SCHEDULED and self.now >= self.policy.not_before:
            self._begin_wave()
        if self.state.phase is Phase.SHADOWING:
            if not self._in(Step.SHADOWING):
                self._begin_shadows()
        elif self.state.wave and not self._in(Step.SHADOWING):
            self._send()
        if self.state.phase is Phase.RUNNING:
            if not self._open():
                self.enter(Phase.SOAKING)
                self.note("rollout.soak", counts=self._counts())
        elif self.members == self.state.members:
            # The gates have seen all that the devices show.
            self._soak()

    def _wait_turn(self) -> None:
        if self.facts.in_the_way:
            names = ", ".join(map(str, self.facts.in_the_way))
            reason = f"rollout {names} has some of its devices"
            if reason != self.state.reason:
                self.enter(Phase.QUEUED, reason)
            return
        self.actions.append(Claim())
        self.enter(Phase.SCHEDULED)

    def _take_in(self) -> None:
        for device, target in self.facts.newcomers.items():
            if device not in self.members:
                self.members[device] = Member(target=target, wave=self.state.waves + 1)
        if self.facts.newcomers:
            self.note("rollout.late", devices=sorted(self.facts.newcomers))

    def _begin_wave(self) -> None:
        wave = self.state.wave + 1
        self.enter(Phase.SHADOWING if wave == 1 and self.policy.shadow else Phase.RUNNING, wave=wave)
        self.note("rollout.wave", devices=sum(member.wave == wave for member in self.members.values()))

    def _begin_shadows(self) -> None:
        """Let the first wave's devices run the new bundle beside the old, as soon as the window is open."""
        if self.policy.window is not None and not self.policy.window.is_open(self.now):
            return
        chosen = tuple(d for d, one in self.members.items() if one.wave == 1 and one.step is Step.WAITING)
        if not chosen:
            self.enter(Phase.RUNNING)
            return
        for device in chosen:
            self._set(device, step=Step.SHADOWING, told_at=self.now)
        self.enter(Phase.SHADOWING)
        self.note("rollout.shadow", devices=list(chosen), share=self.policy.shadow)
        self.actions.append(Shadow(chosen))

    def _end_shadows(self) -> None:
        chosen = self._in(Step.SHADOWING)
        for device in chosen:
            self._set(device, step=Step.WAITING, told_at=0.0)
        if chosen:
            self.actions.append(Unshadow(chosen))

    def _in(self, step: Step) -> tuple[int, ...]:
        return tuple(device for device, member in self.members.items() if member.step is step)

    def _send(self) -> None:
        """Tell as many devices as the limits allow."""
        reach = self.state.waves + 1 if self.state.wave == self.state.waves else self.state.wave
        due = [d for d, member in self.members.items() if member.step is Step.WAITING and member.wave <= reach]
        if not due or (self.policy.window is not None and not self.policy.window.is_open(self.now)):
            return
        chosen = tuple(due[: self._room()])
        for device in chosen:
            member = self.members[device]
            self._set(device, step=Step.UPDATING, told_at=self.now, moved_at=self.now, mark="", tries=member.tries + 1)
        if chosen:
            self.actions.append(Send(chosen))

    def _room(self) -> int:
        room = len(self.members)
        if self.policy.parallel:
            busy = sum(member.step is Step.UPDATING for member in self.members.values())
            room = min(room, self.policy.parallel - busy)
        if self.policy.per_minute:
            lately = sum(
                bool(member.tries) and self.now - SPAN_SECONDS < member.told_at <= self.now
                for member in self.members.values()
            )
            room = min(room, self.policy.per_minute - lately)
        return max(0, room)

    def _open(self) -> bool:
        """Whether devices of the waves that began have neither answered nor are overdue."""
        return any(member.wave <= self.state.wave and self._is_open(member) for member in self.members.values())

    def _is_open(self, member: Member) -> bool:
        if member.step in (Step.WAITING, Step.UPDATING):
            return True
        return (
            member.step is Step.FAILED
            and bool(member.stage)
            and member.stage not in REFUSED_STAGES
            and member.tries <= self.policy.retries
        )

    def _gates(self) -> tuple[GateResult, ...] | None:
        """What the gates say; of shadows, only whether they agree: nothing else is measured yet."""
        if self.facts.gates is None or not self._in(Step.SHADOWING):
            return self.facts.gates
        return tuple(gate for gate in self.facts.gates if gate.gate == AGREEMENT)

    def _soak(self) -> None:
        gates = self._gates()
        if self.state.phase is Phase.HOLDING:
            decided = bool(gates) and all(gate.verdict is Verdict.PASS for gate in gates or ())
            if decided and not self._open() and not self._wants_approval():
                self.promote("the gates pass")
            return
        if self.state.phase not in (Phase.SOAKING, Phase.SHADOWING):
            return
        waited = self.now - self.state.since
        if waited < self.policy.soak or self._open() or gates is None:
            return
        undecided = [gate for gate in gates if gate.verdict is Verdict.UNDECIDED]
        if self.state.phase is Phase.SHADOWING and not gates:
            undecided = [_NO_SHADOW]
        if undecided and waited < self.policy.longest_soak:
            return
        reason = "; ".join(_told(gate) for gate in undecided)
        if undecided and self.policy.undecided is Undecided.ABORT:
            self.abort(f"undecided: {reason}", self.policy.on_abort, gates=undecided)
        elif undecided and self.policy.undecided is Undecided.HOLD and self.state.approved < self.state.wave:
            self._hold(f"the gates have not decided: {reason}")
        elif self._wants_approval():
            self._hold("it waits for approval")
        else:
            self.promote(f"undecided: {reason}" if undecided else "the gates pass")

    def _wants_approval(self) -> bool:
        if self.state.wave >= self.state.waves or self.state.approved >= self.state.wave or self._in(Step.SHADOWING):
            return False
        return self.policy.approval is Approval.EACH or (
            self.policy.approval is Approval.FIRST and self.state.wave == 1
        )

    def _hold(self, reason: str) -> None:
        self.enter(Phase.HOLDING, reason)
        self.note("rollout.hold", reason=reason, counts=self._counts())

    def _end(self) -> None:
        self.enter(Phase.DONE if self._is_whole() else Phase.INCOMPLETE)
        self.note("rollout.end", phase=self.state.phase.value, counts=self._counts())

    def _is_whole(self) -> bool:
        return all(member.step in (Step.SERVING, Step.GONE) for member in self.members.values())

    # After the end.

    def _watch_reverting(self) -> None:
        left = [member for member in self.members.values() if member.step is Step.REVERTING]
        since = max(self.state.since, self.facts.listening_since)
        if (
            left
            and self.now - since <= self.policy.progress_timeout
            and self.now - self.state.since <= (self.policy.deadline)
        ):
            return
        reason = self.state.reason
        self.enter(Phase.ABORTED, reason)
        self.note("rollout.reverted", counts=self._counts())

    def _watch_ended(self) -> None:
        if self.state.phase not in (Phase.DONE, Phase.INCOMPLETE):
            return
        self._take_in()
        self._send()
        whole = self._is_whole()
        if whole != (self.state.phase is Phase.DONE):
            self._end()

    # Parts.

    def _set(self, device: int, **changed: object) -> None:
        self.members[device] = replace(self.members[device], **changed)  # type: ignore[arg-type]

    def _counts(self) -> dict[str, int]:
        return dict(sorted(Counter(member.step.value for member in self.members.values()).items()))


def _told(gate: GateResult) -> str:
    return f"{gate.gate} of {gate.target}: {gate.detail}"
