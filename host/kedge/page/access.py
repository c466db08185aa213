"""Who may ask the page for what, before any route runs.

- A page on loopback answers only to loopback's names in ``Host``: a foreign name that resolves to loopback (DNS
  rebinding) is refused.
- What changes something must come from the page itself or from no browser at all (``Sec-Fetch-Site``, ``Origin``).
- Where there are tokens, each request carries one: ``Authorization: Bearer`` or the cookie of a login.
- Every answer forbids what the page does not need (Content-Security-Policy).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "kedge_page"
LOGIN_SECONDS = 12 * 3600.0
MAX_BODY_BYTES = 64 * 1024
_LOOPBACK_NAMES = {"localhost", "127.0.0.1", "::1"}
_SAFE = {"GET", "HEAD", "OPTIONS"}
_OPEN = ("/login", "/static/")
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Tokens:
    """The tokens of a page and the logins made with them.

    Args:
        tokens: person → token; empty where everybody may come in.
    """

    def __init__(self, tokens: Mapping[str, str]) -> None:
        self._tokens = dict(tokens)
        self._secret = secrets.token_bytes(32)

    def __bool__(self) -> bool:
        return bool(self._tokens)

    def person(self, token: str) -> str | None:
        """Return whose token this is."""
        given = token.encode("utf-8", "backslashreplace")
        matches = [name for name, one in self._tokens.items() if hmac.compare_digest(one.encode(), given)]
        return matches[0] if matches else None

    def login(self, person: str) -> str:
        """Return the cookie of a login; it does not hold the token."""
        text = f"{person}.{time.time() + LOGIN_SECONDS:.0f}"
        return f"{text}.{self._sign(text)}"

    def logged_in(self, cookie: str) -> str | None:
        """Return whose login this cookie is, while it is valid."""
        text, _, signature = cookie.rpartition(".")
        if not hmac.compare_digest(self._sign(text).encode(), signature.encode("utf-8", "backslashreplace")):
            return None
        person, _, until = text.partition(".")
        return person if person in self._tokens and time.time() < float(until) else None

    def _sign(self, text: str) -> str:
        return hmac.new(self._secret, text.encode("utf-8", "backslashreplace"), hashlib.sha256).hexdigest()


class Access:
    """Middleware with the rules of this module.

    Args:
        app: what answers.
        tokens: of the page.
        loopback: whether the page listens on loopback.
    """

    def __init__(self, app: ASGIApp, tokens: Tokens, *, loopback: bool) -> None:
        self._app = app
        self._tokens = tokens
        self._loopback = loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        refusal = self._refusal(request) or self._unknown(request)

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await (refusal or self._app)(scope, receive, guarded)

    def _refusal(self, request: Request) -> Response | None:
        headers = request.headers
        if self._loopback and _name(headers.get("host", "")) not in _LOOPBACK_NAMES:
            return refused(421, "this page answers to localhost and 127.0.0.1 only")
        if request.method in _SAFE:
            return None
        if headers.get("sec-fetch-site", "none") not in {"same-origin", "none"} or not _same_origin(headers):
            return refused(403, "the request comes from another site")
        length = headers.get("content-length", "0")
        # uvicorn refuses a body that is longer than it says; one of unknown length is not needed.
        if "transfer-encoding" in headers or not length.isdigit() or int(length) > MAX_BODY_BYTES:
            return refused(413, f"a body of known length, of at most {MAX_BODY_BYTES} bytes, is expected")
        return None

    def _unknown(self, request: Request) -> Response | None:
        if not self._tokens:
            request.scope["kedge_person"] = "local"
            return None
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        person = self._tokens.person(token) if kind.lower() == "bearer" else None
        person = person or self._tokens.logged_in(request.cookies.get(COOKIE, ""))
        request.scope["kedge_person"] = person
        if person is not None or request.url.path.startswith(_OPEN):
            return None
        if "text/html" in request.headers.get("accept", "") and request.method == "GET":
            return RedirectResponse("/login", status_code=303)
        what = "a token is needed" if not token else "this token is none of the controller's"
        answer = refused(401, f"{what}: Authorization: Bearer TOKEN")
        answer.headers["WWW-Authenticate"] = "Bearer"
        return answer


def refused(
    status: int, what: str, *, kind: str = "Refused", where: str | None = None, remedy: str | None = None
) -> Response:
    """Return an error as JSON, in the form that every JSON route has."""
    return JSONResponse({"error": kind, "what": what, "where": where, "remedy": remedy}, status_code=status)


def _name(host: str) -> str:
    """The name in a ``Host`` header; empty for none that could be read."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _same_origin(headers: Headers) -> bool:
    origin = headers.get("origin")
    if origin is None:
        return True
    try:
        return urlsplit(origin).netloc == headers.get("host", "")
    except ValueError:
        return False
