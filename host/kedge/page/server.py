"""Serves the page from a thread of the controller's process, with an event loop of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import prometheus_client
import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import RedirectResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from kedge.fleet.service import FleetService
from kedge.page import input_views, metrics, rollout_routes, routes, views, watch_routes
from kedge.page.access import COOKIE, LOGIN_SECONDS, Access, Tokens, refused
from kedge.page.asking import PREFIX
from kedge.page.live import MAX_LISTENERS, Live
from kedge.page.options import PageAddress
from kedge_protocol import __version__
from kedge_protocol.addresses import is_loopback
from kedge_protocol.errors import ConfigError, FleetError, InputError, KedgeError, TargetError

log = logging.getLogger(__name__)

START_SECONDS = 30.0
STOP_SECONDS = 2
"""What answers may still take when the controller stops."""
WRONG_TOKEN_SECONDS = 1.0
"""A wrong token is answered this late."""


@contextlib.contextmanager
def serving(state: Path, address: PageAddress) -> Iterator[str]:
    """Serve the page while the block runs; yields its URL.

    Raises:
        ConfigError: the address is taken, or is none of this machine.
    """
    with FleetService(state) as fleet, _listening(address) as listener:
        config = uvicorn.Config(
            application(fleet, address),
            http="h11",
            ws="none",
            loop="asyncio",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=4 * MAX_LISTENERS,
            timeout_graceful_shutdown=STOP_SECONDS,
            ssl_certfile=address.cert,
            ssl_keyfile=address.key,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="page", daemon=True)
        thread.start()
        _wait_started(server, thread)
        url = f"{'http' if address.cert is None else 'https'}://{_shown(listener)}/"
        log.info("the page is at %s", url)
        try:
            yield url
        finally:
            server.should_exit = True
            thread.join(STOP_SECONDS + 10.0)


@contextlib.contextmanager
def _listening(address: PageAddress) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        listener = socket.create_server((address.host, address.port), family=family)
    except OSError as error:
        raise ConfigError(
            f"the page cannot listen on {address.host}:{address.port}: {error.strerror or error}",
            remedy="Choose another --page, or end the process that listens there",
        ) from error
    with listener:
        yield listener


def _shown(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _wait_started(server: uvicorn.Server, thread: threading.Thread) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not server.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise ConfigError("the page did not start", remedy="Look at the log, and at --page-cert and --page-key")
        time.sleep(0.01)


def application(fleet: FleetService, address: PageAddress) -> FastAPI:
    """Return the page as an ASGI application.

    Args:
        fleet: whose page; it must stay open.
        address: the tokens, and whether it is on loopback.
    """
    live = Live(fleet.database)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(live.run())
        yield
        await live.stop()
        await task

    app = FastAPI(
        title="Kedge fleet",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=f"{PREFIX}/openapi.json",
    )
    app.state.fleet, app.state.live, app.state.tokens = fleet, live, Tokens(address.tokens)
    app.state.metrics = metrics.registry(fleet)
    app.include_router(routes.router)
    app.include_router(rollout_routes.router)
    app.include_router(watch_routes.router)
    for pages in (views.router, input_views.router):
        app.include_router(pages, dependencies=[Depends(_note_changes)])
    app.mount("/static", StaticFiles(directory=views.FOLDER / "static"), name="static")
    _add_own_routes(app)
    for kind in (KedgeError, HTTPException, RequestValidationError, OverflowError):
        app.add_exception_handler(kind, _problem)
    app.add_middleware(Access, tokens=app.state.tokens, loopback=is_loopback(address.host))
    return app


def _add_own_routes(app: FastAPI) -> None:
    for path, function, methods in (
        ("/events", events, ["GET"]),
        ("/metrics", figures, ["GET"]),
        ("/login", login_form, ["GET"]),
        ("/login", login, ["POST"]),
        ("/logout", logout, ["POST"]),
    ):
        app.add_api_route(path, function, methods=methods, include_in_schema=False, response_model=None)


async def _note_changes(request: Request) -> None:
    """Note how many changes were seen before a page's data are read."""
    request.state.seen = request.app.state.live.number


async def events(request: Request) -> Response:
    """Server-sent events: something changed."""
    live: Live = request.app.state.live
    if live.listeners >= MAX_LISTENERS:
        return refused(503, f"{MAX_LISTENERS} pages are open already")
    return StreamingResponse(live.events(), media_type="text/event-stream")


def figures(request: Request) -> Response:
    """The fleet's figures for Prometheus."""
    text = prometheus_client.generate_latest(request.app.state.metrics)
    return Response(text, media_type=prometheus_client.CONTENT_TYPE_PLAIN_0_0_4)


def login_form(request: Request) -> Response:
    """A form for a token."""
    return views.render(request, "login.html.j2", wrong=False)


async def login(request: Request) -> Response:
    """Take a token, give a cookie."""
    tokens: Tokens = request.app.state.tokens
    fields = parse_qs((await request.body()).decode("utf-8", "replace"))
    person = tokens.person(fields.get("token", [""])[0])
    if person is None:
        await asyncio.sleep(WRONG_TOKEN_SECONDS)
        return views.render(request, "login.html.j2", 403, wrong=True)
    answer = RedirectResponse("/", status_code=303)
    answer.set_cookie(
        COOKIE,
        tokens.login(person),
        max_age=int(LOGIN_SECONDS),
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )
    return answer


def logout() -> Response:
    """Forget the cookie."""
    answer = RedirectResponse("/login", status_code=303)
    answer.delete_cookie(COOKIE)
    return answer


def _problem(request: Request, error: Exception) -> Response:
    """An error as JSON, or as a page for who asked for one."""
    status, values = _told(request, error)
    headers = getattr(error, "headers", None) or {}
    if request.url.path.startswith(PREFIX) or "text/html" not in request.headers.get("accept", ""):
        answer = refused(status, **values)
    else:
        answer = views.render(request, "error.html.j2", status, **values)
    answer.headers.update(headers)
    return answer


def _told(request: Request, error: Exception) -> tuple[int, dict[str, Any]]:
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return 422, {"kind": "RequestError", "what": str(first["msg"]), "where": where}
    if isinstance(error, OverflowError):
        return 422, {"kind": "RequestError", "what": "a number is too large"}
    if isinstance(error, HTTPException):
        return error.status_code, {"kind": "HTTPError", "what": str(error.detail)}
    if isinstance(error, KedgeError):
        values = {"kind": type(error).__name__, "what": error.what, "where": error.where, "remedy": error.remedy}
        return _status(request, error), values
    raise error


def _status(request: Request, error: KedgeError) -> int:
    if isinstance(error, TargetError):
        return 404
    if isinstance(error, InputError):
        return 409
    if isinstance(error, FleetError):
        if error.what.startswith("the audit log "):
            return 409
        return 404 if request.method == "GET" or error.what.startswith("there is no ") else 409
    return 503
