"""The contract between the HTTP server and what answers its requests.

A server has an ordered table of path prefixes and their :class:`Handler`. For each request it asks the handler in the
event loop, where nothing may block: the answer is a finished :class:`Response` (health, metadata, a refusal) or a
:class:`Job` for one of the handler's worker pools. A job's response may be a stream::

    class Completions:
        def __init__(self) -> None:
            self._pool = WorkerPool("completions", threads=4, queue_limit=16, deadline=60.0)

        def methods(self, path: str) -> Sequence[str]:
            return ("POST",) if path == "/v1/completions" else ()

        def route(self, request: Request) -> Response | Job:
            return Job(self._pool, lambda: self._complete(request))

        def _complete(self, request: Request) -> Response:
            prompt = parse(request.body)              # InputError becomes a 400
            return Response(200, stream=self._tokens(prompt), content_type=EVENT_STREAM)

        def _tokens(self, prompt: Prompt) -> Iterator[bytes]:
            for token in generate(prompt):
                yield server_sent_event(token)        # waits here while the client reads slowly

A client that goes away closes the stream: GeneratorExit is raised at its ``yield``. Between two chunks, or in a job
that does not stream, :attr:`Request.client_gone` says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from kedge_agent.serving.worker_pool import WorkerPool

JSON = "application/json"
EVENT_STREAM = "text/event-stream"


@dataclass(slots=True)
class Request:
    """One request, whole.

    Attributes:
        method: upper case; a HEAD arrives as the GET that it stands for.
        path: of the target without its query, percent-decoded.
        query: what follows the question mark, as it was sent.
        fields: header fields, names in lower case.
        body: without chunks and Content-Encoding.
        client_gone: set by the server when the client has closed the connection; may be read in any thread.
    """

    method: str
    path: str
    query: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    client_gone: bool = False


@dataclass(slots=True)
class Response:
    """The answer to a request.

    Attributes:
        status: HTTP status code.
        body: one piece of bytes, or several that are sent one after another (no copy is made of large tensors).
        content_type: of the body.
        fields: more header fields.
        stream: chunks of a body whose length is not known yet, in place of ``body``. It is iterated in the job's
            thread, which waits while the client is slower; its ``close`` is called when the client goes or the server
            ends. Each chunk must come within the pool's deadline.
    """

    status: int
    body: bytes | Sequence[bytes | memoryview] = b""
    content_type: str = JSON
    fields: Sequence[tuple[str, str]] = ()
    stream: Iterator[bytes] | None = None


@dataclass(slots=True)
class Job:
    """Work for a thread of a pool.

    Attributes:
        pool: whose queue it joins; a full queue is answered with 429.
        run: called in one of the pool's threads. A :class:`~kedge_protocol.errors.InputError` that it raises becomes a
            400, any other error a 500.
    """

    pool: WorkerPool
    run: Callable[[], Response]


class Handler(Protocol):
    """Answers the requests below one path."""

    def methods(self, path: str) -> Sequence[str]:
        """Methods that a path takes (``GET`` includes HEAD; OPTIONS is answered by the server); none: 404."""
        ...

    def route(self, request: Request) -> Response | Job:
        """Answer at once, or name the job that will; called in the event loop, so it must not block."""
        ...


def json_response(status: int, content: object, fields: Sequence[tuple[str, str]] = ()) -> Response:
    """A response with a small JSON body."""
    return Response(status, json.dumps(content, separators=(",", ":")).encode(), fields=fields)


def error_response(status: int, text: str, fields: Sequence[tuple[str, str]] = ()) -> Response:
    """An error as the Open Inference Protocol writes it."""
    return json_response(status, {"error": text}, fields)


def unavailable(text: str, *, status: int = 503, retry_after: int = 1) -> Response:
    """A 503 (or 429) that says after how many seconds to come again."""
    return error_response(status, text, (("Retry-After", str(retry_after)),))


def server_sent_event(data: str, *, event: str | None = None) -> bytes:
    """One event of a ``text/event-stream`` (WHATWG HTML, section 9.2)."""
    lines = [] if event is None else [f"event: {event}"]
    lines += [f"data: {line}" for line in data.split("\n")]
    return ("\n".join(lines) + "\n\n").encode()
