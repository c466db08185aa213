"""The HTTP server: accepts connections, calls the handlers, and enforces the limits for all clients together."""

from __future__ import annotations

import errno
import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

from kedge_agent.serving.access import Access
from kedge_agent.serving.connection import Connection
from kedge_agent.serving.event_loop import READ, EventLoop
from kedge_agent.serving.exchange import Exchange
from kedge_agent.serving.handler import (
    Handler,
    Job,
    Request,
    Response,
    error_response,
    json_response,
    unavailable,
)
from kedge_agent.serving.http_parser import Head
from kedge_agent.serving.settings import ServerSettings

log = logging.getLogger("kedge.serving")

_ACCEPTS_A_TURN = 32
_READ_BYTES = 256 << 10
_LARGE_BODIES = 1 << 20
_REMEMBERED = 256
"""Paths that are looked up once."""
_LONGEST_REMEMBERED = 256


class HttpServer:
    """The HTTP server; it serves until it is stopped.

    Args:
        listening: listening sockets; they are not closed here.
        table: path prefix → handler; the first match answers.
        settings: limits and access rules.
        beat: called in the loop several times a second, with the monotonic time.

    Raises:
        ConfigError: a certificate or token file cannot be read.
    """

    def __init__(
        self,
        listening: Sequence[socket.socket],
        table: Sequence[tuple[str, Handler]],
        settings: ServerSettings,
        beat: Callable[[float], None] = lambda now: None,
    ) -> None:
        self.settings = settings
        self.loop = EventLoop(self._tick)
        self.read_buffer = memoryview(bytearray(_READ_BYTES))
        self.responses: Counter[int] = Counter()
        """Status → number of answers."""
        self.had_large_bodies = False
        """Whether bodies took so much memory that the allocator may keep much of it; whoever returns it clears the
        flag."""
        self._listening = list(listening)
        self._table = table
        self._beat = beat
        self._connections: set[Connection] = set()
        self._counting = threading.Lock()
        self._body_bytes = 0
        self._most_bytes = max(settings.all_bodies_bytes, settings.max_body_bytes)
        self._accepts = False
        self._ends_at: float | None = None
        self.access = Access(settings)
        self._paths: dict[str, tuple[Handler | None, tuple[str, ...]]] = {}
        for one in self._listening:
            one.setblocking(False)

    @property
    def connections(self) -> int:
        """Return the number of open connections."""
        return len(self._connections)

    @property
    def body_bytes(self) -> int:
        """Return the body bytes of all requests that are being received or answered."""
        return self._body_bytes

    def run(self) -> None:
        """Serve until :meth:`stop`."""
        self._accept_again()
        try:
            self.loop.run()
        finally:
            self._accept_no_more()
            for connection in list(self._connections):
                connection.close()
            self.loop.close()

    def stop(self, seconds: float = 0.0) -> None:
        """Accept no more connections, answer accepted requests for ``seconds``, then end :meth:`run`; from any
        thread."""

        def begin() -> None:
            self._ends_at = time.monotonic() + seconds
            self._accept_no_more()
            for connection in list(self._connections):
                connection.close_when_answered()
            self._end_if_done(time.monotonic())

        self.loop.call_soon(begin)

    # What connections ask of the server.

    def begin(self, connection: Connection, head: Head, body: bytes, held: int) -> None:
        """Answer a complete request, or hand it to a worker."""
        head_only = head.method == "HEAD"
        request = Request("GET" if head_only else head.method, head.path, head.query, head.fields, body)
        exchange = Exchange(
            self,
            connection,
            request,
            head_only=head_only,
            keep_alive=head.keep_alive and self._ends_at is None,
            minor=head.minor,
            held=held,
            fields=self.access.cross_origin(head),
        )
        with connection.lock:
            connection.exchange = exchange
        try:
            routed = self._route(request)
        except Exception as error:
            log.exception("a request could not be routed")
            routed = error_response(500, f"{type(error).__name__}: {error}")
        if isinstance(routed, Response):
            exchange.finish(routed)
            return
        exchange.job = routed
        exchange.allowed = routed.pool.deadline
        connection.deadline = time.monotonic() + exchange.allowed
        pool = routed.pool
        if pool.takes_here():
            self.loop.run_here(lambda: pool.run_here(exchange))
        elif not pool.submit(exchange):
            exchange.finish(unavailable(f"too many requests wait for {pool.name!r}", status=429))

    def refuse(self, connection: Connection, response: Response, head: Head | None = None) -> None:
        """Answer an incomplete request, and close.

        Args:
            head: its head, if it was received: a web page may read why it is refused.
        """
        request = Request("GET", "" if head is None else head.path)
        head_only = head is not None and head.method == "HEAD"
        fields = () if head is None else self.access.cross_origin(head)
        exchange = Exchange(self, connection, request, head_only=head_only, keep_alive=False, minor=1, fields=fields)
        with connection.lock:
            connection.exchange = exchange
        exchange.finish(response)

    def worded(self, path: str, response: Response, error: str) -> Response:
        """Return an error response in the form of the path's API; may be called from any thread."""
        handler = self._handler_of(path)
        if handler is None:
            return response
        return json_response(response.status, handler.error_content(response.status, error), response.fields)

    def hold(self, change: int) -> bool:
        """Count body bytes; return False if there are too many now. May be called from any thread."""
        with self._counting:
            self._body_bytes += change
            self.had_large_bodies |= self._body_bytes >= _LARGE_BODIES
            return change <= 0 or self._body_bytes <= self._most_bytes

    def count(self, status: int) -> None:
        """Count an answer; may be called from any thread."""
        with self._counting:
            self.responses[status] += 1

    def ended(self, connection: Connection) -> None:
        """Forget a closed connection."""
        self._connections.discard(connection)
        if self._ends_at is not None:
            self._end_if_done(time.monotonic())
        elif not self._accepts:
            self._accept_again()

    # In the loop.

    def _route(self, request: Request) -> Response | Job:
        handler, methods = self._paths.get(request.path) or self._looked_up(request.path)
        if request.method == "OPTIONS":
            allowed = methods or (("GET", "POST") if request.path == "*" else ())
            if allowed:
                return Response(204, fields=(("Allow", _listed(allowed)),))
        if handler is None or not methods:
            return error_response(404, f"unknown path {request.path[:200]!r}")
        if request.method not in methods:
            text = f"{request.method} is not for this path"
            return error_response(405, text, (("Allow", _listed(methods)),))
        return handler.route(request)

    def _looked_up(self, path: str) -> tuple[Handler | None, tuple[str, ...]]:
        """Return the handler of a path and its methods, and remember them: clients ask for few paths, again and
        again."""
        handler = self._handler_of(path)
        found = handler, tuple(handler.methods(path)) if handler is not None else ()
        if len(self._paths) >= _REMEMBERED:
            self._paths.clear()
        if len(path) <= _LONGEST_REMEMBERED:
            self._paths[path] = found
        return found

    def _handler_of(self, path: str) -> Handler | None:
        return next((handler for prefix, handler in self._table if _is_below(path, prefix)), None)

    def _on_connection(self, listening: socket.socket) -> None:
        by_name = self.access.checks_names(listening)
        for _ in range(_ACCEPTS_A_TURN):
            try:
                link, _ = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionError):
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS) and not self._evict():
                    # Until something is closed; the kernel keeps those that come in its queue.
                    self._accept_no_more()
                return
            self._take(link, by_name=by_name)

    def _take(self, link: socket.socket, *, by_name: bool) -> None:
        link.setblocking(False)
        if link.family != socket.AF_UNIX:
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        tls = self.access.tls
        if tls is not None:
            link = tls.wrap_socket(link, server_side=True, do_handshake_on_connect=False)
        full = len(self._connections) >= self.settings.connections and not self._evict()
        connection = Connection(self, link, encrypted=tls is not None, by_name=by_name)
        self._connections.add(connection)
        connection.start()
        if full:
            self.refuse(connection, unavailable("too many connections"))

    def _evict(self) -> bool:
        """Close the connection that has waited longest for its client; return False if all are being answered."""
        waiting = [connection for connection in self._connections if connection.exchange is None]
        if not waiting:
            return False
        min(waiting, key=lambda connection: connection.deadline).close()
        return True

    def _accept_again(self) -> None:
        if not self._accepts:
            self._accepts = True
            for one in self._listening:
                self.loop.watch(one.fileno(), READ, lambda _, one=one: self._on_connection(one))  # type: ignore[misc]

    def _accept_no_more(self) -> None:
        if self._accepts:
            self._accepts = False
            for one in self._listening:
                self.loop.forget(one.fileno())

    def _tick(self, now: float) -> None:
        self._beat(now)
        for connection in list(self._connections):
            if now > connection.deadline:
                connection.on_deadline()
        if self._ends_at is not None:
            self._end_if_done(now)
        elif not self._accepts:
            self._accept_again()

    def _end_if_done(self, now: float) -> None:
        if not self._connections or (self._ends_at is not None and now >= self._ends_at):
            self.loop.stop()


def _is_below(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith(prefix + "/")


def _listed(methods: Sequence[str]) -> str:
    shown = [*methods, "OPTIONS"]
    if "GET" in methods:
        shown.insert(shown.index("GET") + 1, "HEAD")
    return ", ".join(shown)
