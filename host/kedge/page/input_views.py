"""The page of what is watched on live inputs: drift, shadows, and samples that come home on request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from fastapi import APIRouter, Request
from fastapi.responses import Response

from kedge.fleet import drift, samples, shadows
from kedge.fleet.shadows import ShadowView
from kedge.page.asking import Number, Offset, fleet_of
from kedge.page.views import ROWS, render
from kedge_protocol.samples import Choice

REQUESTS = 20
"""The latest requests for samples."""
UNREPORTED = "pending"
"""A shadow that a device has not reported yet."""

router = APIRouter(include_in_schema=False)


@dataclass(frozen=True)
class ShadowGroup:
    """The shadows of one bundle on all devices: their number by state, and what they answered together."""

    model: str
    digest: str
    counts: dict[str, int]
    compared: int
    agreed: int
    errors: int


def shadow_groups(found: Iterable[ShadowView]) -> list[ShadowGroup]:
    """Join the devices' shadows by model and bundle."""
    groups: dict[tuple[str, str], list[ShadowView]] = {}
    for one in found:
        groups.setdefault((one.model, one.digest), []).append(one)
    return [
        ShadowGroup(
            model,
            digest,
            dict(sorted(Counter(UNREPORTED if one.state is None else one.state.state.value for one in some).items())),
            sum(one.compared for one in some),
            sum(one.agreed for one in some),
            sum(one.errors for one in some),
        )
        for (model, digest), some in sorted(groups.items())
    ]


@router.get("/inputs")
def inputs(request: Request) -> Response:
    """Drift by target, shadows by bundle, the latest requests for samples."""
    fleet = fleet_of(request)
    return render(
        request,
        "inputs.html.j2",
        drifts=drift.cohorts(fleet.database),
        shadows=shadow_groups(shadows.show(fleet)),
        asked=samples.latest(fleet, REQUESTS),
        models=sorted({one.name for one in fleet.releases()}),
        choices=Choice,
    )


@router.get("/inputs/samples/{number}")
def sample_request(request: Request, number: Number, offset: Offset = 0) -> Response:
    """One request for samples, device by device."""
    (asked,) = samples.show(fleet_of(request), number)
    return render(
        request,
        "samples.html.j2",
        asked=asked,
        counts=dict(sorted(Counter(part.state for part in asked.parts).items())),
        parts=asked.parts[offset : offset + ROWS],
        offset=offset,
        rows=ROWS,
    )
