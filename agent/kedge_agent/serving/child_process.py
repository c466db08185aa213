"""The serving process: every installed model over HTTP.

``python -m kedge_agent.serving --state DIR --listen 127.0.0.1:8080``

The agent starts it (see :mod:`kedge_agent.serving.supervisor`) with sockets that already listen, and restarts it when a
runtime has taken it down. One thread serves all connections, each model has its own threads for its calls, and one more
thread watches the models folder and loads.
"""

from __future__ import annotations

import argparse
import functools
import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kedge_agent import malloc
from kedge_agent.serving.handler import Handler, Job, Request, Response
from kedge_agent.serving.heartbeat import EXIT_HUNG, Heartbeat
from kedge_agent.serving.settings import ServerSettings, address_of, listening_socket
from kedge_agent.serving.status_pipe import StatusMessage, StatusWriter
from kedge_protocol import codec
from kedge_protocol.errors import KedgeError
from kedge_targets.pipeline.others import CONSENT

if TYPE_CHECKING:
    from kedge_agent.serving.grpc_server import GrpcServer
    from kedge_agent.serving.model_pool import ServedModels
    from kedge_agent.serving.open_inference import InferenceHandler

log = logging.getLogger("kedge.serving")

_GRACE_SECONDS = 0.5
"""Seconds that calls of other models still get when one hangs."""
_LOAD_FIRST_SECONDS = 3.0
"""Seconds that loading may take before connections are accepted and health is answered; requests for models not yet
loaded wait within their deadline."""
_MEMORY_SECONDS = 1.0
"""Seconds between two checks of whether memory can be returned to the system."""
_SWITCH_SECONDS = 0.001
"""Python's thread switch interval; the default of 5 ms would be added to short answers."""


class ServingProcess:
    """The server, its handlers and its models in this process.

    Args:
        state: the agent's state folder.
        listening: listening sockets.
        settings: limits and access rules.
        status_fd: file descriptor of the pipe to the agent, see :mod:`kedge_agent.serving.status_pipe`.
        page: file descriptor of the shared page, see :mod:`kedge_agent.serving.heartbeat`.
        excluded: digests of bundles that are not loaded because they took the process down before.
        grpc: listening socket for gRPC; without it the process listens on ``settings.grpc_listen`` itself.
    """

    def __init__(
        self,
        state: Path,
        listening: Sequence[socket.socket],
        settings: ServerSettings,
        *,
        status_fd: int | None = None,
        page: int | None = None,
        excluded: Sequence[str] = (),
        grpc: socket.socket | None = None,
    ) -> None:
        from kedge_agent.serving.answer_cache import AnswerCache
        from kedge_agent.serving.http_server import HttpServer
        from kedge_agent.serving.model_pool import ServedModels
        from kedge_agent.serving.open_inference import InferenceHandler
        from kedge_agent.serving.worker_pool import WorkerPool

        self._settings = settings
        self._heartbeat = Heartbeat(page)
        writer = StatusWriter(status_fd)

        def workers(name: str) -> WorkerPool:
            return WorkerPool(
                name,
                queue_limit=settings.queue_limit,
                deadline=settings.call_seconds,
                monitor=self._heartbeat,
                in_loop=True,
            )

        self.models = ServedModels(
            state,
            lambda name, serving: writer.send(StatusMessage(model=name, serving=serving)),
            workers,
            monitor=self._heartbeat,
            excluded=excluded,
        )
        cache = AnswerCache(settings.cache_bytes) if settings.cache_bytes else None
        inference = InferenceHandler(self.models, fleet=settings.fleet, cache=cache, call_seconds=settings.call_seconds)
        self.server = HttpServer(listening, _handlers(self.models, inference), settings, self._beat)
        self._grpc: GrpcServer | None = None
        if settings.grpc_listen is not None:
            from kedge_agent.serving.grpc_server import GrpcServer

            self._grpc = GrpcServer(inference, settings, grpc)
            log.info("gRPC listens on port %d", self._grpc.port)
        self._stop = threading.Event()
        self._beats_told = 0.0
        self._writer = writer
        self._hung = False

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT; return the exit status."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop.set())
        self._writer.send(StatusMessage())
        threading.Thread(target=self.models.watch, args=(self._stop,), name="kedge-models", daemon=True).start()
        # Clients wait in the kernel's queue: a process that is started anew answers them, instead of refusing.
        self.models.first_scan.wait(_LOAD_FIRST_SECONDS)
        server = threading.Thread(target=self.server.run, name="kedge-http", daemon=True)
        server.start()
        if self._grpc is not None:
            self._grpc.start()
        # What is there now stays; the collector need not look at it again and again.
        gc.freeze()
        while not self._stop.wait(_MEMORY_SECONDS):
            if self.server.had_large_bodies and not self.server.body_bytes:
                self.server.had_large_bodies = False
                malloc.give_back()
        seconds = _GRACE_SECONDS if self._hung else self._settings.drain_seconds
        self.server.stop(seconds)
        if self._grpc is not None:
            self._grpc.stop(seconds)
        server.join(self._settings.drain_seconds + 1.0)
        if self._hung:
            # A thread that hangs in a runtime would keep an orderly end from coming.
            logging.shutdown()
            os._exit(EXIT_HUNG)
        return 0

    def _beat(self, now: float) -> None:
        self._heartbeat.beat()
        if now - self._beats_told > 1.0:
            self._beats_told = now
            self._writer.send(StatusMessage())
            hung = self.models.hung(now, self._settings.call_seconds, self._settings.load_seconds)
            if hung is not None and not self._hung:
                log.error("a call of %s hangs; the process ends, to be started anew", hung)
                self._hung = True
                self._stop.set()


class _GenerationHandler(Handler):
    """Answers requests below ``/v1``. What writes text is imported with the first of them: a device without a language
    model needs none of it."""

    def __init__(self, models: ServedModels) -> None:
        self._models = models

    @functools.cached_property
    def _handler(self) -> Handler:
        from kedge_agent.generation.openai import OpenAiHandler

        return OpenAiHandler(self._models)

    def methods(self, path: str) -> Sequence[str]:
        """See :class:`kedge_agent.serving.handler.Handler`."""
        return self._handler.methods(path)

    def route(self, request: Request) -> Response | Job:
        """See :class:`kedge_agent.serving.handler.Handler`."""
        return self._handler.route(request)

    def error_content(self, status: int, text: str) -> object:
        """See :class:`kedge_agent.serving.handler.Handler`."""
        return self._handler.error_content(status, text)


def _handlers(models: ServedModels, inference: InferenceHandler) -> Sequence[tuple[str, Handler]]:
    """Return path prefix → handler."""
    from kedge_agent.serving.metrics import MetricsHandler

    return (
        ("/v2", inference),
        ("/v1", _GenerationHandler(models)),
        ("/metrics", MetricsHandler(models)),
    )


def serve(
    state: Path,
    listening: Sequence[socket.socket],
    settings: ServerSettings,
    *,
    status_fd: int | None = None,
    page: int | None = None,
    excluded: Sequence[str] = (),
    grpc: socket.socket | None = None,
) -> int:
    """Serve in this process until SIGTERM or SIGINT; see :class:`ServingProcess`.

    Raises:
        ConfigError: a certificate or token file cannot be read.
    """
    malloc.one_arena()
    sys.setswitchinterval(_SWITCH_SECONDS)
    # Before numpy is imported: each thread of its algebra would have a buffer of its own.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ[CONSENT] = "on" if settings.cascade else "off"
    process = ServingProcess(state, listening, settings, status_fd=status_fd, page=page, excluded=excluded, grpc=grpc)
    for one in listening:
        log.info("listening on %s", address_of(one, encrypted=settings.tls_cert is not None))
    return process.run()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``python -m kedge_agent.serving``; see the module."""
    parser = argparse.ArgumentParser(prog="python -m kedge_agent.serving", description="Serve the installed models.")
    parser.add_argument("--state", type=Path, required=True, help="the agent's state folder")
    parser.add_argument("--listen", action="append", help="host:port or unix:PATH (default: 127.0.0.1:8080)")
    parser.add_argument("--listen-fd", type=int, action="append", help="file descriptor of a socket that listens")
    parser.add_argument("--grpc-fd", type=int, help="file descriptor of the socket that listens for gRPC")
    parser.add_argument("--settings", default="{}", help="JSON, see kedge_agent.serving.settings.ServerSettings")
    parser.add_argument("--exclude", action="append", default=[], help="digest of a bundle that is not loaded")
    parser.add_argument("--status-fd", type=int, help="file descriptor of the pipe to the agent")
    parser.add_argument("--page-fd", type=int, help="file descriptor of the page that the agent watches")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        settings = codec.decode(given.settings.encode(), ServerSettings, where="--settings")
        if given.listen_fd:
            listening = [socket.socket(fileno=number) for number in given.listen_fd]
        else:
            listening = [listening_socket(address) for address in given.listen or ["127.0.0.1:8080"]]
        grpc = None if given.grpc_fd is None else socket.socket(fileno=given.grpc_fd)
        return serve(
            given.state,
            listening,
            settings,
            status_fd=given.status_fd,
            page=given.page_fd,
            excluded=given.exclude,
            grpc=grpc,
        )
    except KedgeError as error:
        log.error("%s", error)
        return 2


if __name__ == "__main__":
    sys.exit(main())
