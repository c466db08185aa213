"""What is watched on live inputs, as JSON routes: drift, shadows, and samples that come home on request."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body, Query, Request
from pydantic import Field

from kedge.fleet import drift, samples, shadows
from kedge.fleet.drift import CohortDrift
from kedge.fleet.samples import SampleView
from kedge.fleet.shadows import ShadowView
from kedge.page.asking import PREFIX, REFERENCE, Asked, Asking, Labels, Number, Word, fleet_of, problems
from kedge_protocol.samples import MAX_BYTES, MAX_COUNT, MAX_SECONDS, Choice

router = APIRouter(prefix=PREFIX, tags=["live inputs"])


class NewShadow(Asking):
    """A release that shall run beside the one that serves: ``release`` is NAME:VERSION, ``select`` the labels that a
    device must carry, ``share`` that of a processor core, ``memory_mib`` a limit of memory."""

    release: Annotated[str, Field(pattern=REFERENCE)]
    select: Labels = Field(default_factory=dict)
    share: Annotated[float, Field(gt=0, le=1)] = shadows.SHARE
    memory_mib: Annotated[int, Field(ge=1, le=1 << 20)] = shadows.MEMORY_BYTES >> 20


class ShadowEnd(Asking):
    """A model whose shadows end on devices with these labels."""

    model: Word
    select: Labels = Field(default_factory=dict)


class NewSamples(Asking):
    """Hard inputs that devices shall send which allow it: ``count`` of all together, ``max_bytes`` of one, after
    ``seconds`` of looking; of ``low-confidence`` only those ``below`` it."""

    model: Word
    where: Choice
    count: Annotated[int, Field(ge=1, le=MAX_COUNT)] = 50
    select: Labels = Field(default_factory=dict)
    seconds: Annotated[float, Field(gt=0, le=MAX_SECONDS)] = samples.SECONDS
    max_bytes: Annotated[int, Field(ge=1, le=MAX_BYTES)] = samples.MAX_BYTES
    below: Annotated[float, Field(gt=0, le=1)] = 1.0


@router.get("/drift", responses=problems())
def drift_list(request: Request, model: Asked = None, by: Annotated[Word, Query()] = drift.TARGET) -> list[CohortDrift]:
    """Return how far live samples are from the baselines, by target or by a label; those with an alarm first."""
    return list(drift.cohorts(fleet_of(request).database, model=model, by=(by,)))


@router.get("/shadows", responses=problems())
def shadow_list(request: Request, model: Asked = None) -> list[ShadowView]:
    """Return what shadows answered, by device and model."""
    return list(shadows.show(fleet_of(request), model))


@router.post("/shadows", status_code=201, responses=problems(404, 409))
def shadow_start(request: Request, shadow: Annotated[NewShadow, Body()]) -> list[str]:
    """Run a release's bundles as shadows; return the devices."""
    memory = shadow.memory_mib << 20
    fleet = fleet_of(request)
    return list(shadows.start(fleet, shadow.release, shadow.select, share=shadow.share, memory_bytes=memory))


@router.post("/shadows/stop", responses=problems())
def shadow_stop(request: Request, end: Annotated[ShadowEnd, Body()]) -> list[str]:
    """End the shadows of a model; return the devices."""
    return list(shadows.stop(fleet_of(request), end.model, end.select))


@router.get("/samples", responses=problems())
def samples_list(request: Request, limit: Annotated[int, Query(ge=1, le=100)] = 20) -> list[SampleView]:
    """Return the latest requests for samples, newest first."""
    return list(samples.show(fleet_of(request), limit=limit))


@router.post("/samples", status_code=201, responses=problems(404, 409))
def samples_request(request: Request, asked: Annotated[NewSamples, Body()]) -> SampleView:
    """Ask devices for hard inputs of their live calls."""
    return samples.request(
        fleet_of(request),
        asked.model,
        asked.where,
        asked.count,
        asked.select,
        seconds=asked.seconds,
        max_bytes=asked.max_bytes,
        below=asked.below,
    )


@router.get("/samples/{number}", responses=problems(404))
def samples_show(request: Request, number: Number) -> SampleView:
    """Return how far a request is, device by device."""
    return samples.show(fleet_of(request), number)[0]


@router.post("/samples/{number}/cancel", responses=problems(404, 409))
def samples_cancel(request: Request, number: Number) -> SampleView:
    """End a request; devices drop what they have chosen."""
    return samples.cancel(fleet_of(request), number)
