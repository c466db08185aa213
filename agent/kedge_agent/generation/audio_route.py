"""``/v1/audio/transcriptions`` and ``/v1/audio/translations``: the OpenAI API for installed models of speech."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kedge_agent.generation.openai_request import RequestError
from kedge_agent.serving.handler import GOLDEN_FIELD, Request, Response, json_response

if TYPE_CHECKING:
    from kedge_agent.generation.transcription import Transcript
    from kedge_agent.loaded import Loaded

PATHS = ("/v1/audio/transcriptions", "/v1/audio/translations")
FORMS = ("json", "text", "verbose_json")
_PARTS = 64
_BOUNDARY = re.compile(r'boundary="?([^";,\s]{1,70})"?', re.IGNORECASE)
_NAME = re.compile(rb'[;\s]name="([^"]*)"')
_UNSERVED: dict[str, tuple[str, ...]] = {
    "stream": ("", "false", "False"),
    "prompt": ("",),
    "timestamp_granularities[]": ("", "segment"),
    "chunking_strategy": ("", "auto"),
    "include[]": ("",),
}
"""Parameters that are not served, with the values that are accepted."""


@dataclass(frozen=True, kw_only=True)
class AudioRequest:
    """A requested transcript.

    Attributes:
        sound: the bytes of a wav file.
        language: the spoken language; None if the model is to hear it.
        task: ``transcribe`` or ``translate``.
        form: one of :data:`FORMS`.
    """

    model: str
    sound: bytes
    language: str | None
    task: str
    form: str
    temperature: float


def hears(loaded: Loaded) -> bool:
    """Return whether a model writes down what is said."""
    generation = loaded.bundle.config.generation
    return generation is not None and generation.source is not None and generation.source.speech is not None


def parse(request: Request) -> AudioRequest:
    """Parse a request.

    Raises:
        RequestError: the body is no ``multipart/form-data``, or a parameter is missing, wrong or unsupported.
    """
    parts = _parts(request.body, request.fields.get("content-type", ""))
    values = {name: _text(name, value) for name, value in parts.items() if name != "file"}
    for name, neutral in _UNSERVED.items():
        if values.get(name, "") not in neutral:
            raise RequestError("is not served", where=name)
    for name, given in (("file", parts), ("model", values)):
        if not given.get(name):
            raise RequestError("is missing", where=name)
    form = values.get("response_format") or "json"
    if form not in FORMS:
        raise RequestError(f"one of {', '.join(FORMS)} was expected", where="response_format")
    translate = request.path == PATHS[1]
    return AudioRequest(
        model=values["model"],
        sound=parts["file"],
        language=values.get("language") or None,
        task="translate" if translate else "transcribe",
        form=form,
        temperature=_number(values.get("temperature") or "0"),
    )


def _number(value: str) -> float:
    try:
        found = float(value)
    except ValueError as error:
        raise RequestError("a number was expected", where="temperature") from error
    if not 0 <= found <= 2:
        raise RequestError("a number from 0 to 2 was expected", where="temperature")
    return found


def _text(name: str, value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError("is not UTF-8", where=name[:80]) from error


def _parts(body: bytes, content_type: str) -> dict[str, bytes]:
    """Return the parts of a ``multipart/form-data`` body (RFC 7578) by name; of several of one name the last."""
    boundary = _BOUNDARY.search(content_type)
    if not content_type.lower().startswith("multipart/form-data") or boundary is None:
        raise RequestError("multipart/form-data was expected", where="content-type")
    mark = b"--" + boundary[1].encode("latin-1", "replace")
    # The first mark has no line before it.
    pieces = (b"\r\n" + body).split(b"\r\n" + mark, _PARTS + 2)
    if len(pieces) < 3 or not pieces[-1].startswith(b"--"):
        raise RequestError(f"the body is cut short, or has more than {_PARTS} parts", where="body")
    found = {}
    for piece in pieces[1:-1]:
        head, gap, content = piece.partition(b"\r\n\r\n")
        name = _NAME.search(head)
        if not gap or name is None:
            raise RequestError("a part has no name", where="body")
        found[name[1].decode("utf-8", "replace")] = content
    return found


def answer(asked: AudioRequest, loaded: Loaded, request: Request) -> Response:
    """Return the response.

    Args:
        loaded: the model; the whole answer is its own, whatever is switched to meanwhile.

    Raises:
        InputError: the sound cannot be read, or the language is not known.
        BusyError: too many answers already wait.
    """
    options: dict[str, Any] = {"language": asked.language, "task": asked.task, "temperature": asked.temperature}
    options["gone"] = lambda: request.client_gone
    # A probe of the agent's own is counted nowhere.
    own = GOLDEN_FIELD in request.fields
    found: Transcript = loaded.answer(asked.sound, options) if own else loaded(asked.sound, options)
    if asked.form == "text":
        return Response(200, f"{found.text}\n".encode(), content_type="text/plain; charset=utf-8")
    usage = {"type": "duration", "seconds": round(found.seconds)}
    if asked.form == "json":
        return json_response(200, {"text": found.text, "usage": usage})
    return json_response(200, {**_verbose(found, asked), "usage": usage})


def _verbose(found: Transcript, asked: AudioRequest) -> Mapping[str, Any]:
    segments = [
        {
            "id": at,
            "seek": round(100 * one.start),
            "start": one.start,
            "end": one.end,
            "text": one.text,
            "tokens": list(one.tokens),
            "temperature": asked.temperature,
            "avg_logprob": one.mean_log_probability,
            "compression_ratio": _compression(one.text),
            "no_speech_prob": one.no_speech,
        }
        for at, one in enumerate(found.segments)
    ]
    return {
        "task": asked.task,
        "language": found.language,
        "duration": found.seconds,
        "text": found.text,
        "segments": segments,
    }


def _compression(text: str) -> float:
    """Return how much smaller a text becomes by deflate: one that repeats itself becomes much smaller."""
    import zlib

    raw = text.encode()
    return len(raw) / len(zlib.compress(raw)) if raw else 0.0
