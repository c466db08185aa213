"""A request with raw data: ``POST /v2/models/NAME/pipeline`` with a picture, a sound or a text as its body."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kedge_agent.loaded import Loaded
from kedge_agent.serving.handler import Request, Response, error_response, json_response
from kedge_protocol.errors import InputError, MissingDependencyError


def answer(loaded: Loaded, request: Request, *, other: Callable[[str], Callable[[Any], Any]]) -> Response:
    """Return the pipeline's answer as JSON: ``{"model_name": …, "model_version": …, "answer": …}``.

    Args:
        other: returns another model of this device by its name.
    """
    from kedge_targets.pipeline import bodies

    config = loaded.bundle.config
    if loaded.pipeline is None:
        return error_response(404, f"the model {config.name!r} has no pipeline; send tensors to its /infer")
    try:
        found = bodies.answer(
            loaded.pipeline, loaded.named, bytes(request.body), request.fields.get("content-type", ""), other=other
        )
    except MissingDependencyError as error:
        return error_response(501, str(error))
    except InputError as error:
        return error_response(415 if error.where == "content-type" else 400, str(error))
    return json_response(200, {"model_name": config.name, "model_version": config.version, "answer": found})
