"""What a person may order a staged rollout to do: pure, as :mod:`.machine`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from kedge.fleet.staged.machine import Turn
from kedge.fleet.staged.phases import ENDED, Phase, Step
from kedge.fleet.staged.policy import OnAbort, Policy
from kedge.fleet.staged.states import Action, Facts, State
from kedge_protocol.errors import FleetError

Outcome = tuple[State, tuple[Action, ...]]


def pause(policy: Policy, state: State, now: float) -> Outcome:
    """Begin nothing new until :func:`resume`; what devices were told goes on, and the gates go on watching.

    Raises:
        FleetError: it is paused already, or has ended.
    """
    _refuse_ended(state, "pause")
    if state.paused:
        raise FleetError("it is paused already", remedy="Go on: kedge rollout resume")
    turn = Turn(policy, replace(state, paused=True), Facts(), now)
    turn.note("rollout.pause")
    return turn.result()


def resume(policy: Policy, state: State, now: float) -> Outcome:
    """Go on after :func:`pause`.

    Raises:
        FleetError: it is not paused.
    """
    _refuse_ended(state, "resume")
    if not state.paused:
        raise FleetError(f"it is not paused but {state.phase.value}")
    turn = Turn(policy, replace(state, paused=False), Facts(), now)
    turn.note("rollout.resume")
    return turn.result()


def abort(policy: Policy, state: State, now: float, *, reason: str, how: OnAbort | None = None) -> Outcome:
    """Stop it, and take it back where the policy, or ``how``, says so. A rollout that is done is taken back by this
    too.

    Raises:
        FleetError: it was aborted or superseded, or is done and nothing is to be taken back.
    """
    chosen = how or policy.on_abort
    if state.phase in (Phase.REVERTING, Phase.SUPERSEDED) or (
        state.phase is Phase.ABORTED and (chosen is OnAbort.KEEP or not _reached(state))
    ):
        raise FleetError(f"it is {state.phase.value} already")
    if state.phase in (Phase.DONE, Phase.INCOMPLETE) and chosen is OnAbort.KEEP:
        raise FleetError(f"it is {state.phase.value} already", remedy="Take it back: kedge rollout revert")
    turn = Turn(policy, state, Facts(), now)
    turn.abort(reason, chosen)
    return turn.result()


def promote(policy: Policy, state: State, now: float) -> Outcome:
    """Begin the next wave now, whatever the soak time and open gates say.

    Raises:
        FleetError: no wave is under way, or it is paused.
    """
    _refuse_ended(state, "promote")
    if state.paused:
        raise FleetError("it is paused", remedy="Go on first: kedge rollout resume")
    if state.phase not in (Phase.SHADOWING, Phase.RUNNING, Phase.SOAKING, Phase.HOLDING):
        raise FleetError(f"it is {state.phase.value}, no wave is under way")
    is_shadow = any(member.step is Step.SHADOWING for member in state.members.values())
    turn = Turn(policy, state if is_shadow else replace(state, approved=state.wave), Facts(), now)
    turn.promote("by a person")
    return turn.result()


def retry(policy: Policy, state: State, now: float, devices: Collection[int] | None = None) -> Outcome:
    """Tell failed and silent devices again.

    Args:
        devices: only these; None for all.

    Raises:
        FleetError: the rollout goes back or has gone, or no device of it has failed or is silent.
    """
    if state.phase in (Phase.REVERTING, Phase.ABORTED, Phase.SUPERSEDED):
        raise FleetError(f"it is {state.phase.value}", remedy="Roll the release out again")
    turn = Turn(policy, state, Facts(), now)
    chosen = turn.retry([device for device in state.members if devices is None or device in devices])
    if not chosen:
        raise FleetError("none of its devices has failed or is silent")
    if state.phase in (Phase.SOAKING, Phase.HOLDING):
        turn.enter(Phase.RUNNING)
    elif state.phase is Phase.DONE:
        turn.enter(Phase.INCOMPLETE)
    turn.note("rollout.retry", devices=list(chosen))
    return turn.result()


def _reached(state: State) -> bool:
    return any(member.reached for member in state.members.values())


def _refuse_ended(state: State, order: str) -> None:
    if state.phase in ENDED or state.phase is Phase.REVERTING:
        raise FleetError(f"it is {state.phase.value}: there is nothing to {order}")
