"""``/v1/embeddings``: the OpenAI API for installed encoders whose pipeline turns a text into a vector."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kedge_agent.generation.openai_request import RequestError
from kedge_agent.loaded import Loaded

MAX_TEXTS = 256


@dataclass(frozen=True, kw_only=True)
class EmbeddingsRequest:
    """A request for embeddings.

    Attributes:
        model: the model's name.
        texts: the texts to embed.
        base64: whether vectors are returned as base64 of little-endian float32, as OpenAI's own client asks for.
    """

    model: str
    texts: tuple[str, ...]
    base64: bool = False


def parse(body: bytes) -> EmbeddingsRequest:
    """Parse a request's body.

    Raises:
        RequestError: the body is not a JSON object, or a parameter is missing, wrong or unsupported.
    """
    try:
        raw = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {error}") from error
    if not isinstance(raw, Mapping):
        raise RequestError("the body is not a JSON object")
    if not isinstance(raw.get("model"), str):
        raise RequestError("is missing", where="model")
    if raw.get("dimensions") is not None:
        raise RequestError("is not served: a vector has the size that the model gives it", where="dimensions")
    form = raw.get("encoding_format") or "float"
    if form not in ("float", "base64"):
        raise RequestError("float or base64 was expected", where="encoding_format")
    return EmbeddingsRequest(model=raw["model"], texts=_texts(raw.get("input")), base64=form == "base64")


def _texts(value: Any) -> tuple[str, ...]:
    if isinstance(value, list) and value and all(isinstance(one, (int, list)) for one in value):
        raise RequestError(
            "tokens are not served, since each model has a tokenizer of its own: send texts", where="input"
        )
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(one, str) for one in texts):
        raise RequestError("a text or a list of texts was expected", where="input")
    if len(texts) > MAX_TEXTS:
        raise RequestError(f"there are {len(texts)} texts, more than {MAX_TEXTS}", where="input")
    if not all(texts):
        raise RequestError("a text is empty", where="input")
    return tuple(texts)


def is_encoder(loaded: Loaded) -> bool:
    """Return whether a model turns a text into a vector."""
    pipeline = None if loaded.pipeline is None else loaded.pipeline.pipeline
    return pipeline is not None and pipeline.text is not None and pipeline.embedding is not None


def answer(asked: EmbeddingsRequest, loaded: Loaded) -> dict[str, Any]:
    """Return the response's body.

    Args:
        loaded: the model; all vectors are its own, whatever is switched to meanwhile.

    Raises:
        InputError: the model refuses a text.
        MissingDependencyError: a package that the pipeline needs is not installed.
    """
    runner = loaded.pipeline
    if runner is None:
        raise RequestError("has no pipeline", where="model")
    tokenizer = runner.tokenizer()
    tokens = sum(len(tokenizer(text).ids) for text in asked.texts)
    vectors = [np.asarray(runner(text, loaded.named), np.float32) for text in asked.texts]
    data = [
        {"object": "embedding", "index": at, "embedding": _written(vector, as_base64=asked.base64)}
        for at, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": asked.model, "usage": usage}


def _written(vector: Any, *, as_base64: bool) -> Any:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii") if as_base64 else vector.tolist()
