"""What the JSON routes have in common: the shapes of names and bodies, the errors that they may answer, the fleet."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Path, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from kedge.fleet.service import FleetService

PREFIX = "/api/v1"
MAX_ROWS = 1000

_WORD = r"^[A-Za-z0-9][A-Za-z0-9._\-]{0,63}$"
REFERENCE = f"{_WORD[:-1]}:{_WORD[1:]}"
"""NAME:VERSION."""
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


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the errors of a route for the document: those of every route, and these."""
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


def fleet_of(request: Request) -> FleetService:
    """Return the fleet, acting for who asks."""
    fleet: FleetService = request.app.state.fleet
    return fleet.acting_for(f"page:{request.scope.get('kedge_person') or 'local'}")
