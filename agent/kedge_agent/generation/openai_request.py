"""Parses requests of the OpenAI API strictly: an unsupported parameter is an error that names it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kedge_agent.generation import constraint
from kedge_agent.generation.constraint import Constraint
from kedge_agent.generation.sampling import Sampling
from kedge_protocol.errors import InputError

MAX_CHOICES = 8
_TOP = 20
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "best_of": (None, 1),
    "suffix": (None, ""),
    "echo": (None, False),
    "functions": (None, []),
    "tool_choice": (None, "auto", "none"),
    "audio": (None,),
    "modalities": (None, ["text"]),
}
"""Unsupported parameters, with the neutral values that are accepted."""


class RequestError(InputError):
    """A wrong parameter; ``where`` names it."""


@dataclass(frozen=True, kw_only=True)
class TextRequest:
    """A requested completion.

    Attributes:
        chat: whether ``messages`` are given; otherwise ``prompts``.
        prompts: texts or lists of tokens.
        choices: number of answers to each prompt.
        max_tokens: largest number of tokens of an answer; None for all that the context has room for.
        log_probabilities: number of alternatives returned with each token; None for no log-probabilities.
        usage: whether a stream ends with the token counts.
    """

    model: str
    chat: bool
    prompts: tuple[str | Sequence[int], ...] = ()
    messages: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    sampling: Sampling
    choices: int = 1
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    log_probabilities: int | None = None
    stream: bool = False
    usage: bool = False
    constraint: Constraint | None = None


def parse(body: bytes, *, chat: bool) -> TextRequest:
    """Parse a request's body.

    Raises:
        RequestError: the body is not a JSON object, or a parameter is missing, wrong or unsupported.
    """
    try:
        raw = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise RequestError("the body is not a JSON object")
    for name, neutral in _NEUTRAL.items():
        if name in raw and raw[name] not in neutral:
            raise RequestError("is not served", where=name)
    stream = _of(raw, "stream", bool, False)
    options = _of(raw, "stream_options", dict, {})
    limit = raw.get("max_completion_tokens", raw.get("max_tokens", None if chat else 16))
    return TextRequest(
        model=_of(raw, "model", str, None),
        chat=chat,
        prompts=() if chat else _prompts(raw.get("prompt", "")),
        messages=_messages(raw.get("messages")) if chat else (),
        tools=() if raw.get("tool_choice") == "none" else tuple(_of(raw, "tools", list, [])),
        sampling=_sampling(raw),
        choices=_number(raw.get("n"), "n", 1, MAX_CHOICES, default=1),
        max_tokens=None if limit is None else _number(limit, "max_tokens", 1, 1 << 30, default=1),
        stop=_stop(raw.get("stop")),
        log_probabilities=_log_probabilities(raw, chat=chat),
        stream=stream,
        usage=bool(options.get("include_usage")),
        constraint=_constraint(raw.get("response_format")),
    )


def _constraint(form: Any) -> Constraint | None:
    kind = form.get("type") if isinstance(form, Mapping) else None
    if form is None or kind == "text":
        return None
    try:
        if kind == "json_object":
            return constraint.make("json_schema", True)
        if kind == "json_schema" and isinstance(form.get("json_schema"), Mapping):
            return constraint.make("json_schema", form["json_schema"].get("schema"))
    except InputError as error:
        raise RequestError(error.what, where="response_format") from error
    raise RequestError("a type text, json_object or json_schema with its schema was expected", where="response_format")


def _of(raw: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = raw.get(name)
    if value is None:
        if default is None:
            raise RequestError("is missing", where=name)
        return default
    if not isinstance(value, kind):
        raise RequestError(f"a {kind.__name__} was expected", where=name)
    return value


def _number(value: Any, name: str, least: int, most: int, *, default: int) -> int:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise RequestError(f"a whole number from {least} to {most} was expected", where=name)
    return value


def _sampling(raw: Mapping[str, Any]) -> Sampling:
    numbers: dict[str, Any] = {"temperature": 1.0}
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"):
        value = raw.get(name)
        if value is None:
            continue
        whole = name in ("top_k", "seed")
        right = isinstance(value, int) if whole else isinstance(value, (int, float)) and math.isfinite(value)
        if isinstance(value, bool) or not right:
            raise RequestError(f"a {'whole ' if whole else ''}number was expected", where=name)
        numbers[name] = value
    try:
        return Sampling(**numbers)
    except InputError as error:
        raise RequestError(error.what, where=next((one for one in numbers if one in error.what), None)) from error


def _prompts(value: Any) -> tuple[str | Sequence[int], ...]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if all(_is_token(one) for one in value):
            return (tuple(value),)
        if all(isinstance(one, str) or (isinstance(one, list) and all(map(_is_token, one))) for one in value):
            return tuple(value)
    raise RequestError("a text, a list of texts or a list of tokens was expected", where="prompt")


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _messages(value: Any) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, list) or not value or not all(isinstance(one, dict) for one in value):
        raise RequestError("a list of messages was expected", where="messages")
    return tuple(value)


def _stop(value: Any) -> tuple[str, ...]:
    found = [value] if isinstance(value, str) else value or []
    if not isinstance(found, list) or len(found) > 4 or not all(isinstance(one, str) and one for one in found):
        raise RequestError("a text or up to four texts were expected", where="stop")
    return tuple(found)


def _log_probabilities(raw: Mapping[str, Any], *, chat: bool) -> int | None:
    value = raw.get("logprobs")
    if chat:
        top = _number(raw.get("top_logprobs"), "top_logprobs", 0, _TOP, default=0)
        return top if value is True else None
    return None if value is None or value is False else _number(value, "logprobs", 0, _TOP, default=0)
