"""The contract between the HTTP server and the handlers of its requests.

A server has an ordered table of path prefixes and their :class:`Handler`. For each request it calls the handler in the
event loop, where nothing may block: the result is a finished :class:`Response` (health, metadata, a refusal) or a
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

When the client goes away, the stream is closed: GeneratorExit is raised at its ``yield``. Between two chunks, or in a
job that does not stream, :attr:`Request.client_gone` is set.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from kedge_agent.serving.worker_pool import WorkerPool

JSON = "application/json"
EVENT_STREAM = "text/event-stream"
_LONGEST_KNOWN = 256


GOLDEN_FIELD = "kedge-golden"
"""Header field of a call that is none of a user's and is counted nowhere, see :mod:`kedge_agent.served_endpoint`."""


@dataclass(slots=True)
class Request:
    """A complete request.

    Attributes:
        method: upper case; a HEAD arrives as the corresponding GET.
        path: the target's path without its query, percent-decoded.
        query: the part after the question mark, as sent.
        fields: header fields, names in lower case.
        body: decoded from chunks and Content-Encoding.
        client_gone: set by the server when the client has closed the connection; may be read from any thread.
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
        body: one piece of bytes, or several that are sent in order (large tensors are not copied).
        content_type: media type of the body.
        fields: additional header fields.
        stream: chunks of a body of unknown length, in place of ``body``. It is iterated in the job's thread, which
            waits while the client is slower; its ``close`` is called when the client goes or the server ends. Each
            chunk must come within the pool's deadline.
        error: what went wrong, where the body has the server's own form; it is sent in that of the path's API.
    """

    status: int
    body: bytes | Sequence[bytes | memoryview] = b""
    content_type: str = JSON
    fields: Sequence[tuple[str, str]] = ()
    stream: Iterator[bytes] | None = None
    error: str | None = None


@dataclass(slots=True)
class Job:
    """Work for a thread of a worker pool.

    Attributes:
        pool: the pool that runs it; a full queue is answered with 429.
        run: called in one of the pool's threads. An :class:`~kedge_protocol.errors.InputError` becomes a 400, any other
            error a 500. It may return another job, to go on in another pool while this one takes the next request.
    """

    pool: WorkerPool
    run: Callable[[], Response | Job]


class Handler(Protocol):
    """Answers the requests below one path."""

    def methods(self, path: str) -> Sequence[str]:
        """Return the methods of a path (``GET`` includes HEAD; the server answers OPTIONS); an empty result means
        404. It depends on the path alone, and is remembered."""
        ...

    def route(self, request: Request) -> Response | Job:
        """Return the response or the job that will make it; called in the event loop, so it must not block."""
        ...

    def error_content(self, status: int, text: str) -> object:
        """Return the JSON of an error that the server finds itself (a wrong token, a full queue): in the Open Inference
        Protocol's form, unless the API below this path has its own. May be called from any thread."""
        return {"error": text}


def segments(path: str) -> list[str]:
    """Return what stands between a path's slashes; nobody may change the list. Clients ask for few paths, again and
    again: short ones are remembered."""
    return _known_segments(path) if len(path) <= _LONGEST_KNOWN else path.strip("/").split("/")


@functools.lru_cache(256)
def _known_segments(path: str) -> list[str]:
    return path.strip("/").split("/")


def json_response(status: int, content: object, fields: Sequence[tuple[str, str]] = ()) -> Response:
    """Return a response with a small JSON body."""
    return Response(status, _encoded(content), fields=fields)


def error_response(status: int, text: str, fields: Sequence[tuple[str, str]] = ()) -> Response:
    """Return an error response; the server sends it as the path's handler words it, see
    :meth:`Handler.error_content`."""
    return Response(status, _encoded({"error": text}), fields=fields, error=text)


def _encoded(content: object) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()


def unavailable(text: str, *, status: int = 503, retry_after: int = 1) -> Response:
    """Return a 503 (or 429) that says after how many seconds to retry."""
    return error_response(status, text, (("Retry-After", str(retry_after)),))


def server_sent_event(data: str, *, event: str | None = None) -> bytes:
    """Return one event of a ``text/event-stream`` (WHATWG HTML, section 9.2)."""
    lines = [] if event is None else [f"event: {event}"]
    lines += [f"data: {line}" for line in data.split("\n")]
    return ("\n".join(lines) + "\n\n").encode()
