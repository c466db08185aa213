"""The serving child: every installed model over local HTTP.

``python -m kedge_agent.serving --state DIR --listen 127.0.0.1:8080``

The daemon starts it and starts it anew when a runtime has taken it down; after each load it writes
``models/NAME/serving.json``. It is kept lean: the standard library's socket server, one thread a connection, as many as
:attr:`Settings.connections` and no more.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import logging
import os
import signal
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedge_agent import malloc
from kedge_agent.serving import http_parser
from kedge_agent.serving.status_pipe import StatusMessage, StatusWriter
from kedge_protocol.errors import ConfigError, KedgeError

if TYPE_CHECKING:
    from kedge_agent.serving.open_inference import InferenceHandler

log = logging.getLogger("kedge.serving")

_DRAIN_SECONDS = 2.0
_BEAT_SECONDS = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Of the HTTP server.

    Attributes:
        listen: ``host:port``; port 0 takes a free one.
        connections: open at once; one more is refused with 503.
        idle_seconds: a connection without a request is closed after.
        head_seconds, body_seconds: that a request's head and body may take from their first byte on.
        max_body_bytes: a larger request is refused with 413. Its numbers take up to 20 times as much memory.
        call_seconds: a call, or a load, that takes longer has hung: no sign of life is given any more.
    """

    listen: str = "127.0.0.1:8080"
    connections: int = 32
    idle_seconds: float = 30.0
    head_seconds: float = 30.0
    body_seconds: float = 300.0
    max_body_bytes: int = 16 << 20
    call_seconds: float = 180.0


def parse_address(listen: str) -> tuple[str, int]:
    """Host and port of ``host:port`` (an IPv6 host in brackets).

    Raises:
        ConfigError: it is none.
    """
    host, colon, port = listen.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"{listen!r} is not host:port", where="listen", remedy="Give e.g. 127.0.0.1:8080")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    if host in ("localhost", "::1"):
        return True
    try:
        return socket.inet_aton(host)[0] == 127
    except OSError:
        return False


class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """The HTTP server; it listens once it is made.

    Args:
        door: answers the requests.
        settings: see there.
        beat: gives a sign of life; called about once a second by the thread that takes connections.

    Raises:
        ConfigError: the address cannot be listened on.
    """

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, door: InferenceHandler, settings: Settings, beat: Callable[[], None] = lambda: None) -> None:
        self.door = door
        self.settings = settings
        self.calls: dict[int, float] = {}
        """Thread → when its call began (steady clock)."""
        self._beat = beat
        self._beat_at = 0.0
        self._free = threading.BoundedSemaphore(settings.connections)
        host, port = parse_address(settings.listen)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Connection)
        except OSError as error:
            raise ConfigError(
                f"cannot be listened on: {error.strerror or error}",
                where=settings.listen,
                remedy="Choose a free port of this machine",
            ) from error
        if not is_loopback(host):
            log.warning("%s can be reached from other machines, and nobody is asked for a password", settings.listen)

    @property
    def endpoint(self) -> str:
        """The URL, with the port that was taken."""
        host, port = self.server_address[:2]
        shown = f"[{host!s}]" if self.address_family == socket.AF_INET6 else str(host)
        return f"http://{shown}:{port}"

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give the connection a thread, if there is one left."""
        if self._free.acquire(timeout=0.25):
            try:
                super().process_request(request, client_address)
            except BaseException:
                self._free.release()
                raise
            return
        with contextlib.suppress(OSError):
            request.settimeout(0.25)
            request.sendall(http_parser.answer(503, b'{"error":"too many connections"}', keep_alive=False))
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve one connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def service_actions(self) -> None:
        """Between two connections, and at least twice a second."""
        now = time.monotonic()
        if now - self._beat_at >= _BEAT_SECONDS:
            self._beat_at = now
            oldest = min(list(self.calls.values()), default=now)
            if now - oldest <= self.settings.call_seconds:
                self._beat()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error of ours."""
        error = sys.exc_info()[1]
        if isinstance(error, (ConnectionError, TimeoutError)):
            log.debug("a connection ended early: %s", error)
        else:
            log.error("a connection failed", exc_info=True)


class _Connection(socketserver.StreamRequestHandler):
    """One client, request after request."""

    server: Server
    disable_nagle_algorithm = True
    _head_only = False

    def setup(self) -> None:
        super().setup()
        self._source = http_parser.Source(self.connection, self.server.settings.idle_seconds)
        self.rfile = io.BufferedReader(self._source)

    def handle(self) -> None:
        """Until the client wants no more, is silent for too long, or sends what is no request."""
        try:
            while self._one():
                pass
        except http_parser.RefusedError as error:
            self._send(error.status, json.dumps({"error": error.text}).encode(), keep_alive=False)
            self._drain()

    def _one(self) -> bool:
        """Whether another request may follow."""
        self._head_only = False
        self._source.within(self.server.settings.head_seconds)
        head = http_parser.read_head(self.rfile)
        if head is None:
            return False
        self._head_only = head.method == "HEAD"
        length = head.body_length(self.server.settings.max_body_bytes)
        if length and head.fields.get("expect", "").lower() == "100-continue":
            self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._source.within(self.server.settings.body_seconds)
        body = self.rfile.read(length)
        if len(body) != length:
            return False
        self.server.calls[threading.get_ident()] = time.monotonic()
        try:
            method = "GET" if self._head_only else head.method
            found = self.server.door.answer(method, head.path, body)
        finally:
            del self.server.calls[threading.get_ident()]
        try:
            encoded = found.encode()
        except ValueError:
            found = dataclasses.replace(found, status=500)
            encoded = b'{"error":"the result is not finite (NaN or infinity), JSON cannot say it"}'
        self._send(found.status, encoded, keep_alive=head.keep_alive)
        return head.keep_alive

    def _send(self, status: int, body: bytes, *, keep_alive: bool) -> None:
        self.connection.settimeout(self.server.settings.idle_seconds)
        self.connection.sendall(http_parser.answer(status, body, keep_alive=keep_alive, head_only=self._head_only))

    def _drain(self) -> None:
        """Take what the client is still sending, for a while: closed at once, it would not see the answer."""
        until = time.monotonic() + _DRAIN_SECONDS
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(_DRAIN_SECONDS)
            while time.monotonic() < until and self.connection.recv(1 << 16):
                pass


def serve(state: Path, settings: Settings, tell: int | None = None) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        tell: file descriptor of the pipe to the agent, see :mod:`kedge_agent.serving.status_pipe`.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    malloc.one_arena()
    # Before numpy is imported: each thread of its algebra would have a buffer of its own.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from kedge_agent.serving.model_pool import ServedModels
    from kedge_agent.serving.open_inference import InferenceHandler

    writer = StatusWriter(tell)
    models = ServedModels(state, lambda name, serving: writer.tell(StatusMessage(model=name, serving=serving)))

    def beat() -> None:
        since = models.scanning_since
        if since is None or time.monotonic() - since <= settings.call_seconds:
            writer.tell(StatusMessage())

    with Server(InferenceHandler(models), settings, beat) as server:
        beat()
        log.info("listening on %s", server.endpoint)
        stop = threading.Event()

        def end(*_: object) -> None:
            stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, end)
        threads = (
            threading.Thread(target=server.serve_forever, name="kedge-http", daemon=True),
            threading.Thread(target=models.watch, args=(stop,), name="kedge-models", daemon=True),
        )
        for thread in threads:
            thread.start()
        stop.wait()
        server.shutdown()


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m kedge_agent.serving``; see the module."""
    parser = argparse.ArgumentParser(prog="python -m kedge_agent.serving", description="Serve the installed models.")
    parser.add_argument("--state", type=Path, required=True, help="the agent's state folder")
    parser.add_argument("--listen", default=Settings.listen, help="host:port (default: %(default)s)")
    parser.add_argument(
        "--max-body-bytes", type=int, default=Settings.max_body_bytes, help="of a request (default: %(default)s)"
    )
    parser.add_argument(
        "--call-seconds",
        type=float,
        default=Settings.call_seconds,
        help="a longer call has hung (default: %(default)s)",
    )
    parser.add_argument("--tell", type=int, help="file descriptor of the pipe to the agent")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        settings = Settings(listen=given.listen, max_body_bytes=given.max_body_bytes, call_seconds=given.call_seconds)
        serve(given.state, settings, given.tell)
    except KedgeError as error:
        log.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
