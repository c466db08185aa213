"""Asking a handler what the server would ask it, without a socket."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from kedge_agent.serving.handler import Handler, Job, Request, Response, error_response
from kedge_protocol.errors import InputError


@dataclass
class Answer:
    """A response, with its JSON read."""

    status: int
    raw: bytes
    fields: dict[str, str]

    @property
    def body(self) -> Any:
        """The JSON; of a response with binary tensors the part before them."""
        length = self.fields.get("Inference-Header-Content-Length")
        return json.loads(self.raw if length is None else self.raw[: int(length)])


def ask(handler: Handler, method: str, path: str, body: bytes = b"", **fields: str) -> Answer:
    """One request, as the server hands it over: header fields by keyword, underscores for hyphens."""
    path, _, query = path.partition("?")
    named = {name.replace("_", "-"): text for name, text in fields.items()}
    response = _response(handler, Request(method, path, query, named, body))
    whole = response.body if isinstance(response.body, bytes) else b"".join(response.body)
    return Answer(response.status, whole, dict(response.fields))


def _response(handler: Handler, request: Request) -> Response:
    methods = handler.methods(request.path)
    if not methods:
        return error_response(404, "unknown path")
    if request.method not in methods:
        return error_response(405, "not this method")
    routed = handler.route(request)
    if not isinstance(routed, Job):
        return routed
    try:
        return routed.run()
    except InputError as error:
        return error_response(400, str(error))
