"""A request with raw data: ``POST /v2/models/NAME/pipeline`` with a picture, a sound or a text as its body."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kedge_agent.loaded import Loaded
from kedge_agent.serving.handler import Request, Response, error_response, json_response
from kedge_protocol.errors import InputError, MissingDependencyError

if TYPE_CHECKING:
    from kedge_targets.pipeline.cascades import Escalation


def answer(
    loaded: Loaded, request: Request, *, other: Callable[[str], Callable[[Any], Any]]
) -> Response | Callable[[], Response]:
    """Return the pipeline's answer as JSON: ``{"model_name": …, "model_version": …, "answer": …}``, or a function that
    waits for a larger model and then returns it.

    Args:
        other: returns another model of this device by its name.
    """
    from kedge_targets.pipeline import bodies, cascades

    config = loaded.bundle.config
    pipeline = loaded.pipeline
    if pipeline is None:
        return error_response(404, f"the model {config.name!r} has no pipeline; send tensors to its /infer")
    content_type = request.fields.get("content-type", "")
    try:
        if isinstance(pipeline, cascades.CascadeRunner):
            item = bodies.item_of(pipeline, bytes(request.body), content_type)
            items = item if isinstance(item, list) else [item]
            begun = [pipeline.begin(one, loaded.named) for one in items]
            if any(one.waits for one in begun):
                return lambda: _answered(loaded, begun, several=isinstance(item, list))
            return _answered(loaded, begun, several=isinstance(item, list))
        found = bodies.answer(pipeline, loaded.named, bytes(request.body), content_type, other=other)
    except MissingDependencyError as error:
        return error_response(501, str(error))
    except InputError as error:
        return error_response(415 if error.where == "content-type" else 400, str(error))
    return json_response(200, {"model_name": config.name, "model_version": config.version, "answer": found})


def _answered(loaded: Loaded, begun: list[Escalation], *, several: bool) -> Response:
    """Return the answers of a cascade, and which model gave each."""
    from kedge_targets.pipeline.answers import to_json

    config = loaded.bundle.config
    answers = [to_json(one.answer()) for one in begun]
    by = [one.by or (config.name, config.version) for one in begun]
    told = [{"model_name": name, "model_version": version} for name, version in by]
    content = {
        "model_name": config.name,
        "model_version": config.version,
        "answer": answers if several else answers[0],
        "answered_by": told if several else told[0],
    }
    return json_response(200, content)
