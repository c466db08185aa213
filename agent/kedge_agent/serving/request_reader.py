"""Takes the requests of one connection out of the bytes that it receives."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from kedge_agent.serving.http_parser import MAX_HEAD, Body, Head, RefusedError, body_of, parse_head

if TYPE_CHECKING:
    from kedge_agent.serving.http_server import HttpServer

_CARRIAGE_RETURN = 13


class Received(NamedTuple):
    """A complete request.

    Attributes:
        held: bytes that the server counts for its body.
    """

    head: Head
    body: bytes
    held: int


class RequestReader:
    """The received bytes of one connection, used in the loop's thread only.

    Args:
        server: the owner; it admits heads and counts the bytes of bodies.
        on_head: called for each head whose body is still to come, with whether the client waits for ``100 Continue``.
        by_name: whether requests must name this machine.
    """

    __slots__ = ("_body", "_by_name", "_on_head", "_scanned", "_server", "head", "input")

    def __init__(self, server: HttpServer, on_head: Callable[[bool], None], *, by_name: bool = True) -> None:
        self.input = bytearray()
        """Bytes that belong to no request yet."""
        self.head: Head | None = None
        """The head of the request whose body is being received."""
        self._server = server
        self._on_head = on_head
        self._by_name = by_name
        self._scanned = 0
        self._body: Body | None = None

    @property
    def begun(self) -> bool:
        """Return whether a request is partly received."""
        return self.head is not None or bool(self.input)

    def at_once(self, data: memoryview) -> Received | None:
        """Return the request that these bytes are, if they are exactly one and nothing about it takes more care; to be
        called only when no request is :attr:`begun`.

        Raises:
            RefusedError: it is refused.
        """
        whole = bytes(data)
        end = whole.find(b"\r\n\r\n")
        if end < 0 or end > MAX_HEAD or whole[0] == _CARRIAGE_RETURN:
            return None
        # A refusal is the same, whether the rest has come or not.
        head = parse_head(whole[:end])
        length = head.plain_length
        if length != len(whole) - end - 4 or length > self._server.settings.max_body_bytes:
            return None
        self.head = head
        self._server.access.admit(head, by_name=self._by_name)
        try:
            self._hold(length)
        except RefusedError:
            self._server.hold(-length)
            raise
        self.head = None
        return Received(head, whole[end + 4 :], length)

    def take(self, data: memoryview) -> None:
        """Take received bytes.

        Raises:
            RefusedError: the request that they belong to is refused.
        """
        if self._body is not None:
            data = data[self._feed(self._body, data) :]
        self.input += data

    def next(self) -> Received | None:
        """Return the next request, or None if it is not complete yet.

        Raises:
            RefusedError: it is refused.
        """
        if self.head is None and (not self.input or not self._take_head()):
            return None
        body = self._body
        if body is not None:
            if self.input:
                whole = bytes(self.input)
                del self.input[: self._feed(body, memoryview(whole))]
            if not body.done:
                return None
        head = self.head
        if head is None:
            return None
        received = Received(head, b"", 0) if body is None else Received(head, body.content(), body.held)
        self.head = self._body = None
        return received

    def drop(self) -> None:
        """Forget what was received."""
        if self._body is not None:
            self._server.hold(-self._body.held)
            self._body = None
        self.head = None
        self.input.clear()

    def _take_head(self) -> bool:
        data = self.input
        if data.startswith(b"\r\n"):
            # An empty line may follow the body of the request before (RFC 9112, section 2.2).
            del data[:2]
        end = data.find(b"\r\n\r\n", max(self._scanned - 3, 0))
        if end < 0 or end > MAX_HEAD:
            self._scanned = len(data)
            if len(data) > MAX_HEAD:
                raise RefusedError(431, "the head is too long")
            if data.count(b"\n") != data.count(b"\r\n"):
                raise RefusedError(400, "lines of a head end with CRLF")
            return False
        self._scanned = 0
        head = parse_head(bytes(data[:end]))
        del data[: end + 4]
        self.head = head
        self._server.access.admit(head, by_name=self._by_name)
        self._body = body_of(head, self._server.settings.max_body_bytes)
        expected = head.fields.get("expect", "").lower()
        if expected not in ("", "100-continue"):
            raise RefusedError(417, "no such expectation can be met")
        self._on_head(bool(expected and self._body is not None and not data and head.minor))
        return True

    def _feed(self, body: Body, data: memoryview) -> int:
        before = body.held
        taken = body.feed(data)
        self._hold(body.held - before)
        return taken

    def _hold(self, size: int) -> None:
        if not self._server.hold(size):
            raise RefusedError(503, "too much is being sent by all clients together")
