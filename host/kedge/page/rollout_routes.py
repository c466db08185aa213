"""The verbs of rollouts as JSON routes."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Query, Request
from pydantic import Field

from kedge.fleet.results import Progress, RolloutPlan, RolloutStarted, RolloutStatus, RolloutSummary
from kedge.fleet.rollout_status import DeviceFilter
from kedge.fleet.staged import policy as policies
from kedge.fleet.staged.policy import OnAbort, Policy
from kedge.page.asking import PREFIX, REFERENCE, Asking, Labels, Limit, Number, Offset, Word, fleet_of, problems
from kedge_protocol import toml
from kedge_protocol.errors import ConfigError

MAX_POLICY = 16_384
"""Characters of a policy."""

router = APIRouter(prefix=PREFIX, tags=["rollouts"])


class NewRollout(Asking):
    """A rollout to be started: ``release`` is NAME:VERSION, ``select`` the labels that a device must carry. With a
    policy it goes out in waves: ``policy`` as an object, or ``policy_toml`` as the text of a policy file."""

    release: Annotated[str, Field(pattern=REFERENCE)]
    select: Labels = Field(default_factory=dict)
    policy: dict[str, Any] | None = None
    policy_toml: Annotated[str, Field(max_length=MAX_POLICY)] | None = None

    def parsed(self) -> Policy | None:
        """Return the policy; None for a rollout to all devices at once.

        Raises:
            ConfigError: it does not fit.
        """
        if self.policy is not None and self.policy_toml:
            raise ConfigError("there are two policies", remedy="Give policy or policy_toml")
        if self.policy is not None:
            return policies.parse(self.policy)
        if not (self.policy_toml or "").strip():
            return None
        try:
            return policies.parse(toml.loads(self.policy_toml or ""))
        except toml.TOMLDecodeError as error:
            raise ConfigError(f"the policy is no TOML: {error}") from error


class Abort(Asking):
    """How a rollout is aborted: ``on_abort`` in place of the policy's, and a reason for the audit log."""

    on_abort: OnAbort | None = None
    reason: Annotated[str, Field(max_length=200)] = ""


class Retry(Asking):
    """Which devices are told again; all that failed or are silent where none is named."""

    devices: Annotated[list[Word], Field(max_length=1000, default_factory=list)]


@router.get("/rollouts", responses=problems())
def rollout_list(request: Request, limit: Annotated[int, Query(ge=1, le=100)] = 20) -> list[RolloutSummary]:
    """Return the latest rollouts with their counts, newest first."""
    return list(fleet_of(request).rollouts(limit=limit))


@router.post("/rollouts", status_code=201, responses=problems(404, 409))
def rollout_start(request: Request, rollout: Annotated[NewRollout, Body()]) -> RolloutStarted:
    """Roll a release out to the selected devices, in waves where there is a policy."""
    return fleet_of(request).rollout_start(rollout.release, rollout.select, policy=rollout.parsed())


@router.post("/rollout-plans", responses=problems(404, 409))
def rollout_plan(request: Request, rollout: Annotated[NewRollout, Body()]) -> RolloutPlan:
    """Return what such a rollout would do: which device is in which wave, and how many bytes will move."""
    return fleet_of(request).rollout_plan(rollout.release, rollout.select, policy=rollout.parsed())


@router.get("/rollouts/{number}", responses=problems(404))
def rollout_status(
    request: Request,
    number: Number,
    progress: Annotated[list[Progress], Query(max_length=8)] = [],  # noqa: B006
    limit: Limit = 100,
    offset: Offset = 0,
) -> RolloutStatus:
    """Return a rollout with its waves and gates, and the progress of its devices; ``progress`` picks those that stand
    there."""
    shown = DeviceFilter(progress=frozenset(progress), limit=limit, offset=offset)
    return fleet_of(request).rollout_status(number, shown=shown)


@router.post("/rollouts/{number}/revert", responses=problems(404, 409))
def rollout_revert(request: Request, number: Number) -> RolloutStatus:
    """Give each device of a rollout its previous bundle back; this is a rollout of its own."""
    return fleet_of(request).rollout_revert(number)


@router.post("/rollouts/{number}/pause", responses=problems(404, 409))
def rollout_pause(request: Request, number: Number) -> RolloutStatus:
    """Begin nothing new; devices that were told go on, and the gates go on watching."""
    return fleet_of(request).rollout_pause(number)


@router.post("/rollouts/{number}/resume", responses=problems(404, 409))
def rollout_resume(request: Request, number: Number) -> RolloutStatus:
    """Let a paused rollout go on."""
    return fleet_of(request).rollout_resume(number)


@router.post("/rollouts/{number}/promote", responses=problems(404, 409))
def rollout_promote(request: Request, number: Number) -> RolloutStatus:
    """Begin the next wave now, or end the rollout after the last."""
    return fleet_of(request).rollout_promote(number)


@router.post("/rollouts/{number}/abort", responses=problems(404, 409))
def rollout_abort(request: Request, number: Number, abort: Annotated[Abort, Body()]) -> RolloutStatus:
    """Tell no further device, and take those that were told back, or leave them what they have."""
    return fleet_of(request).rollout_abort(number, on_abort=abort.on_abort, reason=abort.reason)


@router.post("/rollouts/{number}/retry", responses=problems(404, 409))
def rollout_retry(request: Request, number: Number, retry: Annotated[Retry, Body()]) -> RolloutStatus:
    """Tell devices again that failed or are silent."""
    return fleet_of(request).rollout_retry(number, retry.devices or None)
