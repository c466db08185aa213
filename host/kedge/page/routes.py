"""The fleet's verbs as JSON routes. Answers hold the fields of the commands' ``--json``, and null where those leave one
out."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body, Query, Request
from pydantic import Field

from kedge.fleet import health
from kedge.fleet.audit import AuditEntry
from kedge.fleet.overview import DeviceHealth, DevicePart, DeviceQuery, DevicesFound, FleetOverview
from kedge.fleet.results import CommandQueued, DeviceDetail, DeviceView, Measurements, ReleaseRemoved, ReleaseView
from kedge.page.asking import PREFIX, Asked, Asking, Labels, Limit, Name, Offset, Word, fleet_of, problems


class NewDevice(Asking):
    """A device to be added, without a kit."""

    name: Word
    target: Word
    labels: Labels = Field(default_factory=dict)


class NewLabels(Asking):
    """Labels to be set, and keys of labels to be removed."""

    labels: Labels = Field(default_factory=dict)
    without: Annotated[list[Word], Field(max_length=64, default_factory=list)]


router = APIRouter(prefix=PREFIX)


@router.get("/fleet", responses=problems(), tags=["fleet"])
def fleet_overview(request: Request) -> FleetOverview:
    """Return the fleet in counts: by target, health and release."""
    return fleet_of(request).overview()


@router.get("/health", responses=problems(404), tags=["fleet"])
def controller_health(request: Request) -> dict[str, float]:
    """Return how many seconds ago the controller was connected to its broker; 404 if it is not."""
    return {"age_seconds": health.check(fleet_of(request).state).age_seconds}


@router.get("/audit", responses=problems(), tags=["audit"])
def audit_list(
    request: Request, subject: Annotated[str | None, Query(max_length=128)] = None, limit: Limit = 50
) -> list[AuditEntry]:
    """Return entries of the audit log, newest first; ``subject`` is such as ``rollout 7`` or a device's name."""
    return list(fleet_of(request).audit_log(limit=limit, subject=subject))


@router.get("/audit/head", responses=problems(409), tags=["audit"])
def audit_verify(
    request: Request, expect: Annotated[str | None, Query(pattern="^[0-9a-f]{8,64}$")] = None
) -> dict[str, str]:
    """Check that no entry of the log was changed or taken out, and return the newest one's hash; ``expect`` is a hash
    that it showed earlier, and must still hold."""
    return {"head": fleet_of(request).audit_verify(expect=expect)}


@router.get("/devices", responses=problems(), tags=["devices"])
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
    return fleet_of(request).device_find(query)


@router.post("/devices", status_code=201, responses=problems(404, 409), tags=["devices"])
def device_add(request: Request, device: Annotated[NewDevice, Body()]) -> DeviceView:
    """Register a device; nothing changes on it before a rollout."""
    return fleet_of(request).device_add(device.name, device.target, device.labels)


@router.get("/devices/{name}", responses=problems(404), tags=["devices"])
def device_show(request: Request, name: Name) -> DeviceDetail:
    """Return one device with its transfers and its latest telemetry."""
    return fleet_of(request).device(name)


@router.patch("/devices/{name}", responses=problems(404, 409), tags=["devices"])
def device_edit(request: Request, name: Name, edit: Annotated[NewLabels, Body()]) -> DeviceView:
    """Change a device's labels."""
    fleet_of(request).device_history(name)
    return fleet_of(request).device_edit(name, edit.labels, edit.without)


@router.delete("/devices/{name}", response_model=None, status_code=204, responses=problems(404), tags=["devices"])
def device_remove(request: Request, name: Name) -> None:
    """Remove a device; it keeps serving its models."""
    fleet_of(request).device_remove(name)


@router.get("/devices/{name}/history", responses=problems(404), tags=["devices"])
def device_history(request: Request, name: Name) -> list[DevicePart]:
    """Return what the latest rollouts wanted of a device, newest first."""
    return list(fleet_of(request).device_history(name))


@router.post("/devices/{name}/report", status_code=202, responses=problems(404), tags=["devices"])
def device_report(request: Request, name: Name) -> CommandQueued:
    """Ask a device for a fresh report."""
    return fleet_of(request).device_report(name)


@router.get("/latencies", responses=problems(), tags=["devices"])
def latencies(request: Request, target: Asked = None) -> Measurements:
    """Return the latency of each bundle on the devices that proved it."""
    return fleet_of(request).latencies(target)


@router.get("/releases", responses=problems(), tags=["releases"])
def release_list(request: Request) -> list[ReleaseView]:
    """Return all published releases, oldest first."""
    return list(fleet_of(request).releases())


@router.delete("/releases/{name}/{version}", responses=problems(404, 409), tags=["releases"])
def release_remove(request: Request, name: Name, version: Name) -> ReleaseRemoved:
    """Remove a release that no device shall run."""
    return fleet_of(request).release_remove(f"{name}:{version}")
