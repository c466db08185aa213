"""``/v1``: the OpenAI API for the installed language models and encoders. Streams are server-sent events; an answer
ends when its client goes away."""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kedge_agent.generation import audio_route, embeddings_route, openai_errors, openai_request
from kedge_agent.generation.generator import AnswerStream, TextGenerator
from kedge_agent.generation.openai_request import RequestError, TextRequest
from kedge_agent.generation.tickets import CANCELLED, LENGTH, TIMEOUT, BusyError, Token
from kedge_agent.serving.handler import (
    EVENT_STREAM,
    GOLDEN_FIELD,
    Handler,
    Job,
    Request,
    Response,
    json_response,
    server_sent_event,
)
from kedge_agent.serving.worker_pool import WorkerPool
from kedge_protocol import digest
from kedge_protocol.errors import InputError, KedgeError, MissingDependencyError, NeighbourError

if TYPE_CHECKING:
    from kedge_agent.loaded import Loaded
    from kedge_agent.serving.model_pool import ServedModels

log = logging.getLogger("kedge.generation")

_THREADS = 32
_QUEUE = 64
_FINGERPRINT = 12
"""Digits of the bundle's digest in ``system_fingerprint``, as many as `kedge rollout status` shows."""


class OpenAiHandler(Handler):
    """Answers requests below ``/v1``; see :class:`kedge_agent.serving.handler.Handler`.

    Args:
        models: looked up again for each request.
        deadline: seconds until the answer, or until a stream's next piece.
    """

    def __init__(self, models: ServedModels, *, deadline: float = 180.0) -> None:
        self._models = models
        self._pool = WorkerPool("generation", threads=_THREADS, queue_limit=_QUEUE, deadline=deadline)

    def methods(self, path: str) -> Sequence[str]:
        """See :class:`kedge_agent.serving.handler.Handler`."""
        if path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", *audio_route.PATHS):
            return ("POST",)
        return ("GET",) if path == "/v1/models" or path.startswith("/v1/models/") else ()

    def error_content(self, status: int, text: str) -> object:
        """See :class:`kedge_agent.serving.handler.Handler`."""
        return openai_errors.content(status, text)

    def route(self, request: Request) -> Response | Job:
        """See :class:`kedge_agent.serving.handler.Handler`."""
        if request.method == "GET":
            return self._list(request.path.removeprefix("/v1/models").strip("/"))
        if request.path == "/v1/embeddings":
            return Job(self._pool, lambda: self._answer(request, self._embed))
        if request.path in audio_route.PATHS:
            return Job(self._pool, lambda: self._answer(request, self._transcribe))
        chat = request.path == "/v1/chat/completions"
        return Job(self._pool, lambda: self._answer(request, lambda one: self._complete(one, chat=chat)))

    def _list(self, name: str) -> Response:
        found = [self._described(one) for one in self._models.names() if self._serves(one)]
        if not name:
            return json_response(200, {"object": "list", "data": found})
        one = next((entry for entry in found if entry["id"] == name), None)
        return json_response(200, one) if one is not None else self._no_model(name, self._serves)

    def _described(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": 0, "owned_by": "kedge"}

    def _no_model(self, name: str, fits: Callable[[str], bool]) -> Response:
        there = ", ".join(one for one in self._models.names() if fits(one)) or "none"
        text = f"no model {name[:80]!r} for this serves here; for this there are: {there}"
        return openai_errors.refusal(404, text, param="model", code="model_not_found")

    def _serves(self, name: str) -> bool:
        kinds = (_writes, embeddings_route.is_encoder, audio_route.hears)
        return any(self._loaded(name, kind) is not None for kind in kinds)

    def _asked(self, name: str, kind: Callable[[Loaded], bool]) -> Loaded | Response:
        """Return the model with this name if it serves and fits, otherwise the answer that it does not."""
        found = self._loaded(name, kind)
        if found is None and not self._models.scanned:
            self._models.wait_for(name, None, self._pool.deadline)
            found = self._loaded(name, kind)
        if found is not None:
            return found
        entry = self._models.get(name)
        if not self._models.scanned or (entry is not None and entry.model is None):
            why = "the models are still being loaded" if entry is None else entry.error
            fields = (("Retry-After", "5"),)
            return openai_errors.refusal(503, f"the model {name[:80]!r} is not ready: {why}", fields=fields)
        return self._no_model(name, lambda one: self._loaded(one, kind) is not None)

    def _loaded(self, name: str, fits: Callable[[Loaded], bool]) -> Loaded | None:
        """Return the model with this name if it serves and fits, otherwise None."""
        entry = self._models.get(name)
        if entry is None or entry.model is None:
            return None
        with contextlib.suppress(InputError):
            loaded = entry.model.loaded()
            return loaded if fits(loaded) else None
        return None

    def _complete(self, request: Request, *, chat: bool) -> Response:
        asked = openai_request.parse(request.body, chat=chat)
        loaded = self._asked(asked.model, _writes)
        if isinstance(loaded, Response):
            return loaded
        completion = _Completion(asked, loaded, counted=GOLDEN_FIELD not in request.fields)
        if asked.stream:
            completion.begin()
            return Response(200, stream=completion.events(), content_type=EVENT_STREAM)
        return json_response(200, completion.whole(request))

    def _embed(self, request: Request) -> Response:
        asked = embeddings_route.parse(request.body)
        loaded = self._asked(asked.model, embeddings_route.is_encoder)
        if isinstance(loaded, Response):
            return loaded
        return json_response(200, embeddings_route.answer(asked, loaded))

    def _transcribe(self, request: Request) -> Response:
        asked = audio_route.parse(request)
        loaded = self._asked(asked.model, audio_route.hears)
        if isinstance(loaded, Response):
            return loaded
        return audio_route.answer(asked, loaded, request)

    def _answer(self, request: Request, run: Callable[[Request], Response]) -> Response:
        try:
            return run(request)
        except RequestError as error:
            return openai_errors.refusal(400, str(error), param=error.where)
        except MissingDependencyError as error:
            # A client's option that this device was not set up for, or a tokenizer that it lacks.
            return openai_errors.refusal(501, str(error), param=error.where)
        except BusyError as error:
            return openai_errors.refusal(429, str(error), fields=(("Retry-After", "1"),))
        except InputError as error:
            code = "context_length_exceeded" if "context" in error.what else None
            return openai_errors.refusal(400, str(error), param=error.where, code=code)
        except NeighbourError as error:
            log.error("%s", error)
            return openai_errors.refusal(503, str(error), fields=(("Retry-After", "5"),))
        except KedgeError as error:
            log.error("%s", error)
            return openai_errors.refusal(500, str(error))


def _writes(loaded: Loaded) -> bool:
    generation = loaded.bundle.config.generation
    return generation is not None and generation.writes and not audio_route.hears(loaded)


@dataclass
class _Choice:
    """One choice of a response.

    Attributes:
        told: the number of tokens that were sent.
        offset: where the next token's text begins in the answer.
    """

    index: int
    answer: AnswerStream
    told: int = 0
    offset: int = 0

    @property
    def reason(self) -> str:
        """Return the finish reason in the API's terms."""
        found = self.answer.answer
        ended = found.reason if found is not None else CANCELLED
        return "length" if ended in (LENGTH, TIMEOUT) else "stop"


class _Completion:
    """One request's choices, complete or as events."""

    def __init__(self, asked: TextRequest, loaded: Loaded, *, counted: bool) -> None:
        self._asked = asked
        self._counted = counted
        # Held until the end: the bundle that began an answer ends it, whatever is switched to meanwhile.
        self._loaded = loaded
        self._generator: TextGenerator = loaded.generator
        self._id = f"{'chatcmpl' if asked.chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._choices: list[_Choice] = []

    def begin(self) -> None:
        """Submit every choice to the engine.

        Raises:
            InputError: a prompt is too long, or the template refuses the messages.
            BusyError: too many answers already wait.
        """
        try:
            for tokens, options in self._prompts():
                for _ in range(self._asked.choices):
                    at = len(self._choices)
                    self._choices.append(_Choice(at, self._begun(tokens, options, at)))
        except BaseException:
            self._close()
            raise

    def _prompts(self) -> list[tuple[Sequence[int], dict[str, Any]]]:
        """Return the decoder's prompts and further options of each."""
        asked, generator = self._asked, self._generator
        if asked.chat:
            return [(generator.tokens(list(asked.messages), tools=asked.tools or None), {})]
        return [
            generator.prepared(one, {}) if isinstance(one, str) else generator.from_tokens(one) for one in asked.prompts
        ]

    def _begun(self, tokens: Sequence[int], options: dict[str, Any], at: int) -> AnswerStream:
        asked, sampling = self._asked, self._asked.sampling
        if sampling.seed is not None and at:
            from dataclasses import replace

            sampling = replace(sampling, seed=sampling.seed + at)
        room = max(1, self._generator.spec.context - len(tokens))
        return self._loaded.begin(
            tokens,
            counted=self._counted,
            max_tokens=min(asked.max_tokens or room, room),
            sampling=sampling,
            stop=asked.stop,
            log_probabilities=asked.log_probabilities,
            constraint=asked.constraint,
            **options,
        )

    def _close(self) -> None:
        for choice in self._choices:
            choice.answer.close()

    def whole(self, request: Request) -> dict[str, Any]:
        """Return the body of an answer that is not streamed."""
        self.begin()
        try:
            for choice in self._choices:
                for _ in choice.answer:
                    if request.client_gone:
                        self._close()
            choices = [self._finished(choice) for choice in self._choices]
        finally:
            self._close()
        return {**self._head(""), "choices": choices, "usage": self._usage()}

    def _finished(self, choice: _Choice) -> dict[str, Any]:
        answer = choice.answer.finish()
        found: dict[str, Any] = {"index": choice.index, "finish_reason": choice.reason}
        if self._asked.chat:
            found["message"] = {"role": "assistant", "content": answer.text}
        else:
            found["text"] = answer.text
        return {**found, "logprobs": self._logs(choice, choice.answer.tokens)}

    def events(self) -> Iterator[bytes]:
        """Yield the events of a stream."""
        try:
            yield from self._events()
        except KedgeError as error:
            yield server_sent_event(_json(openai_errors.content(500, str(error))))
        finally:
            self._close()

    def _events(self) -> Iterator[bytes]:
        chunk = ".chunk" if self._asked.chat else ""
        for choice in self._choices:
            if self._asked.chat:
                yield self._event(chunk, choice, {"role": "assistant", "content": ""})
            for piece in choice.answer:
                yield self._event(chunk, choice, {"content": piece} if self._asked.chat else piece)
            yield self._event(chunk, choice, {} if self._asked.chat else "", ended=True)
        if self._asked.usage:
            yield server_sent_event(_json({**self._head(chunk), "choices": [], "usage": self._usage()}))
        yield server_sent_event("[DONE]")

    def _event(self, chunk: str, choice: _Choice, content: Any, *, ended: bool = False) -> bytes:
        new = choice.answer.tokens[choice.told :]
        choice.told += len(new)
        body = {
            "index": choice.index,
            ("delta" if self._asked.chat else "text"): content,
            "logprobs": self._logs(choice, new),
            "finish_reason": choice.reason if ended else None,
        }
        found: dict[str, Any] = {**self._head(chunk), "choices": [body]}
        if self._asked.usage:
            found["usage"] = None
        return server_sent_event(_json(found))

    def _head(self, chunk: str) -> dict[str, Any]:
        kind = f"chat.completion{chunk}" if self._asked.chat else "text_completion"
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._asked.model,
            "system_fingerprint": f"fp_{digest.hex_of(self._loaded.digest)[:_FINGERPRINT]}",
        }

    def _usage(self) -> dict[str, Any]:
        answers = [choice.answer.answer for choice in self._choices]
        written = sum(len(choice.answer.tokens) for choice in self._choices)
        firsts = [one for one in answers[:: self._asked.choices] if one is not None]
        read, cached = sum(one.prompt_tokens for one in firsts), sum(one.cached_tokens for one in firsts)
        return {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _logs(self, choice: _Choice, tokens: Sequence[Token]) -> Mapping[str, Any] | None:
        if self._asked.log_probabilities is None:
            return None
        if self._asked.chat:
            return {"content": [self._log(one) for one in tokens], "refusal": None}
        texts, offsets = [self._text(one.id) for one in tokens], []
        for text in texts:
            offsets.append(choice.offset)
            choice.offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [one.log_probability for one in tokens],
            "top_logprobs": [{self._text(other): value for other, value in one.top} for one in tokens],
            "text_offset": offsets,
        }

    def _log(self, token: Token) -> dict[str, Any]:
        def entry(one: int, value: float | None) -> dict[str, Any]:
            return {"token": self._text(one), "logprob": value, "bytes": list(self._generator.token_bytes(one))}

        top = [entry(other, value) for other, value in token.top]
        return {**entry(token.id, token.log_probability), "top_logprobs": top}

    def _text(self, token: int) -> str:
        return self._generator.token_bytes(token).decode(errors="replace")


def _json(content: object) -> str:
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False)
