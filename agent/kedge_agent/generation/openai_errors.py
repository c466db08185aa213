"""Errors in the OpenAI API's form: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kedge_agent.serving.handler import Response, json_response

_CODES = {401: "invalid_api_key", 405: "method_not_supported"}


def content(status: int, text: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return the body of an error with this HTTP status.

    Args:
        param: the request's parameter that is wrong.
        code: of the API; by default that of the status, if it has one.
    """
    kind = "rate_limit_error" if status == 429 else "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": text, "type": kind, "param": param, "code": code or _CODES.get(status)}}


def refusal(
    status: int,
    text: str,
    *,
    param: str | None = None,
    code: str | None = None,
    fields: Sequence[tuple[str, str]] = (),
) -> Response:
    """Return a response with :func:`content`."""
    return json_response(status, content(status, text, param=param, code=code), fields)
