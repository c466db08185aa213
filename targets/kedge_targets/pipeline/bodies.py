"""Takes a request's body as a pipeline's item; a server mounts this to answer pictures, sounds and texts."""

from __future__ import annotations

import json
from typing import Any

from kedge_protocol.errors import InputError
from kedge_targets.pipeline import pictures
from kedge_targets.pipeline.answers import to_json
from kedge_targets.pipeline.execution import Other, Raw, Runner

PICTURES = ("image/jpeg", "image/png", "image/bmp", "image/webp")
SOUNDS = ("audio/wav", "audio/x-wav", "audio/wave", "audio/vnd.wave")
TEXTS = ("text/plain", "application/json")
_UNSTATED = ("", "application/octet-stream", "application/x-www-form-urlencoded")
"""What clients send that were told no type; the last one is ``curl --data-binary @photo.jpg``."""
_OTHER_NAMES = {"image/jpg": "image/jpeg", "image/x-ms-bmp": "image/bmp"}


def media_types(pipeline: Runner) -> tuple[str, ...]:
    """Return the content types that a pipeline accepts."""
    declared = pipeline.pipeline
    if declared.picture is not None:
        return PICTURES
    return SOUNDS if declared.sound is not None else TEXTS


def answer(
    pipeline: Runner,
    raw_callable: Raw,
    body_bytes: bytes,
    content_type: str,
    *,
    max_pixels: int = pictures.MAX_PIXELS,
    other: Other | None = None,
) -> Any:
    """Answer one request: takes a picture, a sound or a text and returns plain data for JSON.

    To mount it, let a route (such as ``POST /v2/models/NAME/pipeline``) call, in a thread that may block::

        loaded = model.loaded()
        answer(loaded.pipeline, loaded.named, body, headers["content-type"])

    and send the result as JSON with status 200; :class:`InputError` becomes 400 (415 if the type is not in
    :func:`media_types`), :class:`MissingDependencyError` 501, each with its text. The server limits the body's bytes;
    this function limits their decoded size: pictures by the pixels in their header, sounds by their seconds, texts by
    their characters.

    Args:
        pipeline: the loaded bundle's pipeline.
        raw_callable: the bare model: maps input name → samples with batch axis to output name → results with batch
            axis.
        body_bytes: a JPEG, PNG, BMP or WebP file, a wav file, UTF-8 text, or JSON: a string or a list of strings.
        content_type: the body's content type, with or without parameters; of a picture or a sound it may be left out
            or be what a client sends that knows none.
        max_pixels: the maximum number of a picture's pixels.
        other: the device's other models, for a pipeline that continues with one.

    Raises:
        InputError: the content type is not accepted, or the body does not match it.
        MissingDependencyError: a package that the pipeline needs is not installed.
    """
    item = item_of(pipeline, body_bytes, content_type, max_pixels=max_pixels)
    return to_json(pipeline(item, raw_callable, other=other))


def item_of(pipeline: Runner, body_bytes: bytes, content_type: str, *, max_pixels: int = pictures.MAX_PIXELS) -> Any:
    """Return the pipeline's item from a request's body; see :func:`answer`."""
    kind = content_type.partition(";")[0].strip().lower()
    kind = _OTHER_NAMES.get(kind, kind)
    known = media_types(pipeline)
    if kind in _UNSTATED and known is not TEXTS:
        kind = known[0]
    if kind not in known:
        raise InputError(
            f"a body of type {kind or '(none)'} is not what this model takes",
            where="content-type",
            remedy=f"Send {', '.join(known)}",
        )
    if kind in PICTURES:
        return pictures.decode(body_bytes, where="body", max_pixels=max_pixels)
    return _text(body_bytes, as_json=kind == "application/json") if kind in TEXTS else body_bytes


def _text(body: bytes, *, as_json: bool) -> Any:
    try:
        text = body.decode("utf-8")
        item = json.loads(text) if as_json else text
    except (ValueError, RecursionError) as error:
        raise InputError(f"cannot be read: {error}", where="body") from error
    several = isinstance(item, list) and all(isinstance(one, str) for one in item)
    if not several and not isinstance(item, str):
        raise InputError("is neither a string nor a list of strings", where="body")
    return item
