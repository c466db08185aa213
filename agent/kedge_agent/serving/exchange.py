"""One request on its way from the server to a worker, and its answer on the way back."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from kedge_agent.serving.handler import Job, Request, Response, error_response, unavailable
from kedge_protocol.errors import InputError, KedgeError

if TYPE_CHECKING:
    from kedge_agent.serving.connection import Connection
    from kedge_agent.serving.http_server import HttpServer

log = logging.getLogger("kedge.serving")

REASONS = {
    200: "OK",
    204: "No Content",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    413: "Content Too Large",
    415: "Unsupported Media Type",
    417: "Expectation Failed",
    421: "Misdirected Request",
    422: "Unprocessable Content",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    501: "Not Implemented",
    503: "Service Unavailable",
}
_JOINED = 64 << 10
"""Bytes of an answer up to which it is copied behind its head."""
_STREAM_AHEAD = 64 << 10
"""Bytes of a stream that are queued for a slow client before the stream pauses."""


class Exchange:
    """One request and its answer, which is sent once: by the worker or by the deadline, whichever comes first.

    Args:
        request: the request as handlers get it.
        head_only: whether the answer has no body (HEAD).
        keep_alive: whether another request may follow.
        minor: minor number of the client's HTTP version.
        held: bytes of the body, counted by the server until the answer is ready.
        fields: header fields that every answer to this request carries.
    """

    __slots__ = (
        "_connection", "_fields", "_head_only", "_held", "_minor", "_server", "abandoned", "allowed", "begun", "job",
        "keep_alive", "request",
    )  # fmt: skip

    def __init__(
        self,
        server: HttpServer,
        connection: Connection,
        request: Request,
        *,
        head_only: bool,
        keep_alive: bool,
        minor: int,
        held: int = 0,
        fields: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.request = request
        self.keep_alive = keep_alive
        self.job: Job | None = None
        self.allowed = server.settings.call_seconds
        self.begun = False
        """Whether a part of the answer was sent."""
        self.abandoned = False
        self._server = server
        self._connection = connection
        self._head_only = head_only
        self._minor = minor
        self._held = held
        self._fields = fields

    def run(self) -> None:
        """Run the job and send its answer; called in a worker."""
        job = self.job
        if job is None or self.abandoned:
            return
        try:
            done = job.run()
            if isinstance(done, Job):
                self.job = done
                if done.pool.submit(self):
                    return
                done = unavailable(f"too many requests wait for {done.pool.name}", status=429)
            response = done
        except InputError as error:
            response = error_response(400, str(error))
        except MemoryError:
            log.exception("%s: not enough memory for a call", job.pool.name)
            response = unavailable("there is not enough memory for this request")
        except KedgeError as error:
            log.error("%s: %s", job.pool.name, error)
            response = error_response(500, str(error))
        except Exception as error:
            # Whatever a runtime may raise: one call fails, the server goes on.
            log.exception("%s: a call failed", job.pool.name)
            response = error_response(500, f"{type(error).__name__}: {error}")
        if response.stream is None:
            self.finish(response)
        else:
            self._stream(response, response.stream)

    def finish(self, response: Response) -> None:
        """Send a complete answer; may be called from any thread. A second answer is dropped."""
        self._let_go_of_body()
        if response.error is not None:
            response = self._server.worded(self.request.path, response, response.error)
        body = response.body
        parts = (body,) if isinstance(body, (bytes, memoryview)) else body
        length = len(body) if isinstance(body, bytes) else sum(memoryview(part).nbytes for part in parts)
        head = self._head(response, b"Content-Length: %d\r\n" % length if response.status != 204 else b"")
        pieces: Sequence[bytes | memoryview]
        if self._head_only:
            pieces = (head,)
        elif length < _JOINED:
            pieces = (b"".join((head, *parts)),)
        else:
            pieces = (head, *parts)
        if self._connection.send(pieces, self, last=True):
            self._server.count(response.status)
        else:
            self.abandoned = True

    def abandon(self) -> None:
        """Give up the request, since its client has gone."""
        self.abandoned = True
        self.request.client_gone = True
        self._let_go_of_body()

    def _let_go_of_body(self) -> None:
        held, self._held = self._held, 0
        if held:
            self._server.hold(-held)

    def _head(self, response: Response, length: bytes) -> bytes:
        start = _start(response.status, response.content_type, self.keep_alive, self._minor)
        if not response.fields and not self._fields:
            return b"%b%b\r\n" % (start, length)
        more = "".join(f"{name}: {text}\r\n" for name, text in (*response.fields, *self._fields))
        return b"%b%b%b\r\n" % (start, length, more.encode("latin-1"))

    def _stream(self, response: Response, chunks: Iterator[bytes]) -> None:
        """Send chunks as they come, no faster than the client reads them; called in a worker."""
        self._let_go_of_body()
        connection = self._connection
        in_chunks = self._minor == 1
        if not in_chunks:
            self.keep_alive = False  # an HTTP/1.0 client finds the end by the close
        head = self._head(response, b"Transfer-Encoding: chunked\r\n" if in_chunks else b"")
        try:
            self.begun = True
            wanted = connection.send([head], self, last=self._head_only)
            while wanted and not self._head_only:
                chunk = next(chunks, None)
                if self.job is not None:
                    self.job.pool.progressed()
                if chunk is None:
                    connection.send([b"0\r\n\r\n"] if in_chunks else [], self, last=True)
                    break
                if chunk:
                    framed = [b"%x\r\n" % len(chunk), chunk, b"\r\n"] if in_chunks else [chunk]
                    wanted = connection.send(framed, self, last=False)
                    wanted = wanted and connection.wait_for_room(_STREAM_AHEAD, self)
            self._server.count(response.status if wanted else 499)
        except Exception:
            # The client sees a body that does not end as it should, and so knows that it is not whole.
            log.exception("a stream failed")
            self._server.loop.call_soon(connection.close)
        finally:
            close = getattr(chunks, "close", None)
            if close is not None:
                close()


@functools.lru_cache(64)
def _start(status: int, content_type: str, keep_alive: bool, minor: int) -> bytes:
    """Return the status line and the fields that do not depend on the answer."""
    close = b"" if keep_alive else b"Connection: close\r\n"
    if keep_alive and not minor:
        close = b"Connection: keep-alive\r\n"
    kind = b"" if status == 204 else b"Content-Type: %b\r\n" % content_type.encode("ascii")
    reason = REASONS.get(status, "Error").encode("ascii")
    return b"HTTP/1.1 %d %b\r\n%b%b" % (status, reason, kind, close)
