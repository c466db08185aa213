"""The pages: each reads the fleet once and renders a template."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jinja2
from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse, Response

from kedge.fleet import drift, health, shadows
from kedge.fleet.overview import DeviceHealth, DeviceQuery, FleetOverview
from kedge.fleet.results import DeviceDetail, Progress, RolloutStatus
from kedge.fleet.rollout_status import DeviceFilter
from kedge.fleet.service import FleetService
from kedge.fleet.units import size_text, span_text
from kedge.page import drawing, stages
from kedge.page.asking import Name, Number, Offset
from kedge_protocol.errors import KedgeError
from kedge_protocol.messages import ModelTelemetry

FOLDER = Path(__file__).parent
ROWS = 100
"""Devices on a page."""
ROLLOUTS = 20
EVENTS = 30
"""Entries of the audit log on a rollout's page."""

Given = Annotated[str, Query(max_length=64)]
"""A field of the list's form; empty for any."""

router = APIRouter(include_in_schema=False)
_REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox"


@functools.cache
def environment() -> jinja2.Environment:
    """The templates with their filters; a name that is not there is an error."""
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {
        "size": size_text,
        "short": lambda digest: "–" if digest is None else digest.removeprefix("sha256:")[:12],
        "ago": ago_text,
        "moment": lambda at: time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at)) if at else "never",
        "iso": lambda at: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at)),
        "figure": number_text,
        "cells": drawing.cells,
        "span": span_text,
        "steps": stages.ordered,
        "percent": lambda part, whole: f"{100 * part / whole:.0f} %" if whole else "–",
    }
    return found


def number_text(value: float | None) -> str:
    """Return a figure with three digits, and all digits before the point."""
    if value is None:
        return "–"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def render(request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
    """Render a page."""
    tokens = request.app.state.tokens
    person = request.scope.get("kedge_person") if tokens else None
    seen = getattr(request.state, "seen", "")
    text = environment().get_template(template).render(path=request.url.path, person=person, seen=seen, **values)
    return HTMLResponse(text, status_code=status)


def ago_text(at: float) -> str:
    """Return how long ago something was."""
    if not at:
        return "never"
    seconds = max(0.0, time.time() - at)
    if seconds < 10:
        return "just now"
    return f"{span_text(seconds if seconds >= 120 else seconds // 10 * 10)} ago"


def _fleet(request: Request) -> FleetService:
    fleet: FleetService = request.app.state.fleet
    return fleet


def _controller(fleet: FleetService) -> str | None:
    """What is wrong with the controller; None if it is at its broker."""
    try:
        health.check(fleet.state)
    except KedgeError as error:
        return error.what
    return None


@dataclass(frozen=True)
class Matrix:
    """Which target serves which release of a model: ``counts`` by version, then target."""

    model: str
    versions: dict[str, dict[str, int]]


def matrices(overview: FleetOverview) -> list[Matrix]:
    """One matrix a model."""
    found: dict[str, Matrix] = {}
    for one in overview.releases:
        matrix = found.setdefault(one.model, Matrix(one.model, {}))
        matrix.versions.setdefault(one.version, {})[one.target] = one.devices
    return list(found.values())


@router.get("/")
def fleet(request: Request) -> Response:
    """The fleet at a glance."""
    fleet = _fleet(request)
    overview = fleet.overview()
    return render(
        request,
        "fleet.html.j2",
        fleet=overview,
        matrices=matrices(overview),
        rollouts=fleet.rollouts(limit=5),
        trouble=_controller(fleet),
    )


@router.get("/devices")
def devices(
    request: Request,
    target: Given = "",
    health: Given = "",
    model: Given = "",
    version: Given = "",
    text: Given = "",
    offset: Offset = 0,
) -> Response:
    """A list of devices."""
    query = DeviceQuery(
        target=target or None,
        health=DeviceHealth(health) if health in {one.value for one in DeviceHealth} else None,
        model=model or None,
        version=version if model else None,
        text=text or None,
        limit=ROWS,
        offset=offset,
    )
    fleet = _fleet(request)
    return render(
        request,
        "devices.html.j2",
        query=query,
        found=fleet.device_find(query),
        fleet=fleet.overview(),
        kinds=DeviceHealth,
    )


@dataclass(frozen=True)
class Plot:
    """A plot of a device's telemetry."""

    title: str
    unit: str
    line: drawing.Line


def plots(detail: DeviceDetail) -> list[Plot]:
    """The device's telemetry over time; what it does not measure is left out."""
    messages = detail.telemetry
    series: list[tuple[str, str, list[float | None]]] = []
    for model in sorted({name for message in messages for name in message.models}):
        told = [message.models.get(model) for message in messages]
        for name in ("p50", "p95", "p99"):
            values = [None if one is None else one.latency_ms.get(name) for one in told]
            series.append((f"{model}: latency {name}", "ms", values))
        series.append((f"{model}: failed calls", "%", [failed_share(one) for one in told]))
    series.append(("CPU", "%", [one.cpu_percent for one in messages]))
    used = [(one.memory_total_bytes - one.memory_available_bytes) / 2**20 for one in messages]
    series.append(("memory in use", "MiB", list(used)))
    series.append(("agent's memory", "MiB", [one.agent_bytes / 2**20 for one in messages]))
    series.append(("temperature", "°C", [one.temperature_c for one in messages]))
    drawn = [(title, unit, drawing.line(values)) for title, unit, values in series]
    return [Plot(title, unit, line) for title, unit, line in drawn if line is not None]


def failed_share(told: ModelTelemetry | None) -> float | None:
    """Return the percentage of an interval's calls that failed; None without calls."""
    return None if told is None or not told.calls else 100 * told.errors / told.calls


@router.get("/devices/{name}")
def device(request: Request, name: Name) -> Response:
    """One device: what it runs and why, its figures and its history."""
    fleet = _fleet(request)
    detail, history = fleet.device(name), fleet.device_history(name)
    reasons = {part.model: part for part in reversed(history) if part.superseded_by is None}
    return render(
        request,
        "device.html.j2",
        detail=detail,
        device=detail.device,
        history=history,
        reasons=reasons,
        plots=plots(detail),
        drifts=drift.cohorts(fleet.database, by=(), device=name),
        shadows=shadows.show(fleet, device=name),
    )


@router.get("/rollouts")
def rollouts(request: Request) -> Response:
    """The latest rollouts."""
    return render(request, "rollouts.html.j2", rollouts=_fleet(request).rollouts(limit=ROLLOUTS))


def by_target(status: RolloutStatus) -> dict[str, dict[str, int]]:
    """Count a rollout's devices by target and progress, in the order of :class:`Progress`."""
    counts: dict[str, dict[str, int]] = {}
    for one in sorted(status.devices, key=lambda one: (one.target, _ORDER[one.progress])):
        target = counts.setdefault(one.target, {})
        target[one.progress.value] = target.get(one.progress.value, 0) + 1
    return counts


_ORDER = {
    one: place
    for place, one in enumerate(
        (
            Progress.DONE,
            Progress.PROVING,
            Progress.FETCHING,
            Progress.PENDING,
            Progress.WAITING,
            Progress.OFFLINE,
            Progress.SUPERSEDED,
            Progress.SILENT,
            Progress.CONFLICT,
            Progress.FAILED,
        )
    )
}
_TROUBLE_FIRST = tuple(reversed(_ORDER))


@router.get("/rollouts/{number}")
def rollout(request: Request, number: Number, offset: Offset = 0) -> Response:
    """One rollout: how far it is, and its devices, those with trouble first."""
    fleet = _fleet(request)
    status = fleet.rollout_status(number, shown=DeviceFilter())
    stage = status.stage
    place = {one: index for index, one in enumerate(_TROUBLE_FIRST)}
    listed = sorted(status.devices, key=lambda one: place[one.progress])
    return render(
        request,
        "rollout.html.j2",
        rollout=status,
        stage=stage,
        gates=() if stage is None else stages.gate_views(stage.gates),
        actions=() if stage is None else stages.actions(number, stage),
        events=() if stage is None else stages.events(fleet.audit_log(limit=EVENTS, subject=f"rollout {number}")),
        targets=by_target(status),
        devices=listed[offset : offset + ROWS],
        offset=offset,
        rows=ROWS,
    )


@router.get("/releases")
def releases(request: Request) -> Response:
    """All published releases."""
    fleet = _fleet(request)
    found = fleet.releases()
    reports = {one.digest for one in found if fleet.repository.report_path(one.digest).is_file()}
    return render(request, "releases.html.j2", releases=tuple(reversed(found)), reports=reports)


@router.get("/releases/{name}/{version}/report")
def report(request: Request, name: Name, version: Name) -> Response:
    """The compile report as the publisher wrote it: it may draw, and run nothing."""
    content = _fleet(request).release_report(name, version)
    return HTMLResponse(content, headers={"Content-Security-Policy": _REPORT_POLICY})
