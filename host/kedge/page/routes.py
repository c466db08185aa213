"""The fleet's verbs as JSON routes. Answers hold the fields of the commands' ``--json``, and null where those leave one
out."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Path, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from kedge.fleet import health
from kedge.fleet.overview import DeviceHealth, DevicePart, DeviceQuery, DevicesFound, FleetOverview
from kedge.fleet.results import (
    CommandQueued,
    DeviceDetail,
    DeviceView,
    Measurements,
    Progress,
    ReleaseRemoved,
    ReleaseView,
    RolloutStarted,
    RolloutStatus,
    RolloutSummary,
)
from kedge.fleet.rollout_status import DeviceFilter
from kedge.fleet.service import FleetService

PREFIX = "/api/v1"
MAX_ROWS = 1000

_WORD = r"^[A-Za-z0-9][A-Za-z0-9._\-]{0,63}$"
Word = Annotated[str, Field(pattern=_WORD)]
"""A name of a device, label, model or version."""
Name = Annotated[str, Path(pattern=_WORD)]
Asked = Annotated[str | None, Query(pattern=_WORD)]
Number = Annotated[int, Path(ge=1, le=1 << 53)]
Limit = Annotated[int, Query(ge=1, le=MAX_ROWS)]
Offset = Annotated[int, Query(ge=0, le=1 << 53)]
Labels = Annotated[dict[Word, Word], Field(max_length=64, json_schema_extra={"additionalProperties": False})]


class Problem(BaseModel):
    """An error: what was wrong, where, and what to do."""

    error: str
    what: str
    where: str | None = None
    remedy: str | None = None


class Asking(BaseModel):
    """What a request's body has in common: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid")


class NewDevice(Asking):
    """A device to be added, without a kit."""

    name: Word
    target: Word
    labels: Labels = {}


class NewLabels(Asking):
    """Labels to be set, and keys of labels to be removed."""

    labels: Labels = {}
    without: Annotated[list[Word], Field(max_length=64)] = []


class NewRollout(Asking):
    """A rollout to be started: ``release`` is NAME:VERSION, ``select`` the labels that a device must carry."""

    release: Annotated[str, Field(pattern=f"{_WORD[:-1]}:{_WORD[1:]}")]
    select: Labels = {}


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    texts = {
        404: "There is none.",
        409: "The fleet's state or its rules forbid it.",
        503: "The state folder does not answer.",
    }
    common = {
        400: "Bad request.",
        401: "A token is needed.",
        403: "The request comes from another site.",
        413: "The body is too large.",
        421: "A foreign name for this host.",
        422: "The request does not fit.",
    }
    found = common | {status: texts[status] for status in (*statuses, 503)}
    return {status: {"model": Problem, "description": text} for status, text in found.items()}


def _fleet(request: Request) -> FleetService:
    fleet: FleetService = request.app.state.fleet
    return fleet.acting_for(f"page:{request.scope.get('kedge_person') or 'local'}")


router = APIRouter(prefix=PREFIX)


@router.get("/fleet", responses=_problems(), tags=["fleet"])
def fleet_overview(request: Request) -> FleetOverview:
    """Return the fleet in counts: by target, health and release."""
    return _fleet(request).overview()


@router.get("/health", responses=_problems(404), tags=["fleet"])
def controller_health(request: Request) -> dict[str, float]:
    """Return how many seconds ago the controller was connected to its broker; 404 if it is not."""
    return {"age_seconds": health.check(_fleet(request).state).age_seconds}


@router.get("/devices", responses=_problems(), tags=["devices"])
def device_list(
    request: Request,
    target: Asked = None,
    health: DeviceHealth | None = None,
    model: Asked = None,
    version: Asked = None,
    text: Annotated[str | None, Query(max_length=64)] = None,
    limit: Limit = 100,
    offset: Offset = 0,
) -> DevicesFound:
    """Return the devices that fit, by name."""
    query = DeviceQuery(
        target=target, health=health, model=model, version=version, text=text, limit=limit, offset=offset
    )
    return _fleet(request).device_find(query)


@router.post("/devices", status_code=201, responses=_problems(404, 409), tags=["devices"])
def device_add(request: Request, device: Annotated[NewDevice, Body()]) -> DeviceView:
    """Register a device; nothing changes on it before a rollout."""
    return _fleet(request).device_add(device.name, device.target, device.labels)


@router.get("/devices/{name}", responses=_problems(404), tags=["devices"])
def device_show(request: Request, name: Name) -> DeviceDetail:
    """Return one device with its transfers and its latest telemetry."""
    return _fleet(request).device(name)


@router.patch("/devices/{name}", responses=_problems(404, 409), tags=["devices"])
def device_edit(request: Request, name: Name, edit: Annotated[NewLabels, Body()]) -> DeviceView:
    """Change a device's labels."""
    _fleet(request).device_history(name)
    return _fleet(request).device_edit(name, edit.labels, edit.without)


@router.delete("/devices/{name}", response_model=None, status_code=204, responses=_problems(404), tags=["devices"])
def device_remove(request: Request, name: Name) -> None:
    """Remove a device; it keeps serving its models."""
    _fleet(request).device_remove(name)


@router.get("/devices/{name}/history", responses=_problems(404), tags=["devices"])
def device_history(request: Request, name: Name) -> list[DevicePart]:
    """Return what the latest rollouts wanted of a device, newest first."""
    return list(_fleet(request).device_history(name))


@router.post("/devices/{name}/report", status_code=202, responses=_problems(404), tags=["devices"])
def device_report(request: Request, name: Name) -> CommandQueued:
    """Ask a device for a fresh report."""
    return _fleet(request).device_report(name)


@router.get("/latencies", responses=_problems(), tags=["devices"])
def latencies(request: Request, target: Asked = None) -> Measurements:
    """Return the latency of each bundle on the devices that proved it."""
    return _fleet(request).latencies(target)


@router.get("/releases", responses=_problems(), tags=["releases"])
def release_list(request: Request) -> list[ReleaseView]:
    """Return all published releases, oldest first."""
    return list(_fleet(request).releases())


@router.delete("/releases/{name}/{version}", responses=_problems(404, 409), tags=["releases"])
def release_remove(request: Request, name: Name, version: Name) -> ReleaseRemoved:
    """Remove a release that no device shall run."""
    return _fleet(request).release_remove(f"{name}:{version}")


@router.get("/rollouts", responses=_problems(), tags=["rollouts"])
def rollout_list(request: Request, limit: Annotated[int, Query(ge=1, le=100)] = 20) -> list[RolloutSummary]:
    """Return the latest rollouts with their counts, newest first."""
    return list(_fleet(request).rollouts(limit=limit))


@router.post("/rollouts", status_code=201, responses=_problems(404, 409), tags=["rollouts"])
def rollout_start(request: Request, rollout: Annotated[NewRollout, Body()]) -> RolloutStarted:
    """Roll a release out to the selected devices."""
    return _fleet(request).rollout_start(rollout.release, rollout.select)


@router.get("/rollouts/{number}", responses=_problems(404), tags=["rollouts"])
def rollout_status(
    request: Request,
    number: Number,
    progress: Annotated[list[Progress], Query(max_length=8)] = [],  # noqa: B006
    limit: Limit = 100,
    offset: Offset = 0,
) -> RolloutStatus:
    """Return a rollout with the progress of its devices; ``progress`` picks those that stand there."""
    shown = DeviceFilter(progress=frozenset(progress), limit=limit, offset=offset)
    return _fleet(request).rollout_status(number, shown=shown)


@router.post("/rollouts/{number}/revert", responses=_problems(404, 409), tags=["rollouts"])
def rollout_revert(request: Request, number: Number) -> RolloutStatus:
    """Give each device of a rollout its previous bundle back; this is a rollout of its own."""
    _fleet(request).rollout_status(number, shown=DeviceFilter(limit=0))
    return _fleet(request).rollout_revert(number)
