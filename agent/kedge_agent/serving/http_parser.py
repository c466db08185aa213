"""HTTP/1.1 (RFC 9112) as far as the serving child needs it: requests with a Content-Length, answers in JSON.

The standard library's ``http.server`` would do the same, but it brings the mail parser, ``ssl`` and more: 3.3 MiB of
an agent that has 60.
"""

from __future__ import annotations

import re
import socket
import time
from dataclasses import dataclass
from io import BufferedIOBase, RawIOBase
from typing import Any

_MAX_LINE = 16 << 10
_MAX_FIELDS = 100
_MAX_HEAD = 64 << 10
"""Bytes of a whole head, the request line included."""
_REQUEST_LINE = re.compile(rb"([A-Z]{1,16}) ([!-~]{1,8192}) HTTP/1\.([01])\Z")
_FIELD_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z")

REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    411: "Length Required",
    413: "Content Too Large",
    415: "Unsupported Media Type",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
}


class RefusedError(Exception):
    """A request that gets no further than its head.

    Args:
        status: to answer with; the connection is closed after it.
        text: what was wrong.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


@dataclass(frozen=True)
class Head:
    """A request without its body.

    Attributes:
        fields: header fields, names in lower case.
        keep_alive: whether the client wants to send another request on the connection.
    """

    method: str
    path: str
    fields: dict[str, str]
    keep_alive: bool

    def body_length(self, limit: int) -> int:
        """Bytes of the body.

        Raises:
            RefusedError: no length, more than ``limit``, or a body in a form that is not taken.
        """
        if "transfer-encoding" in self.fields:
            raise RefusedError(411, "send the body with a Content-Length")
        if self.fields.get("content-encoding", "identity") != "identity":
            raise RefusedError(415, "send the body without a Content-Encoding")
        if "inference-header-content-length" in self.fields:
            raise RefusedError(400, "binary tensors are not offered, send JSON")
        text = self.fields.get("content-length", "0")
        if not (text.isascii() and text.isdecimal()):
            raise RefusedError(400, "the Content-Length is no number")
        # The length of the text first: a number of thousands of digits takes long to read.
        if len(text) > 18 or int(text) > limit:
            raise RefusedError(413, f"the body is larger than {limit} bytes")
        return int(text)


class Source(RawIOBase):
    """What a client sends. Each wait is bound, and so is the whole of a head or a body: a byte now and then must not
    hold a connection for ever.

    Args:
        connection: to read from.
        idle: seconds that one wait may last.
    """

    def __init__(self, connection: socket.socket, idle: float) -> None:
        self._connection = connection
        self._idle = idle
        self._allowed = 0.0
        self._until: float | None = None

    def within(self, seconds: float) -> None:
        """What is read from here on must come within so many seconds of its first byte."""
        self._allowed, self._until = seconds, None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Raises TimeoutError where the client takes too long."""
        left = self._idle if self._until is None else self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request takes too long")
        self._connection.settimeout(min(self._idle, left))
        got = self._connection.recv_into(buffer)
        if self._until is None:
            self._until = time.monotonic() + self._allowed
        return got


def read_head(stream: BufferedIOBase) -> Head | None:
    """Read up to the empty line.

    Returns:
        None where the client closed the connection instead of sending a request.

    Raises:
        RefusedError: no HTTP/1.x, or too long.
    """
    line = _line(stream)
    if line == b"":
        # One empty line may follow the body of the request before.
        line = _line(stream)
    if line is None:
        return None
    match = _REQUEST_LINE.match(line)
    if match is None:
        raise RefusedError(400, "not a request of HTTP/1.1")
    method, path, minor = (part.decode("ascii") for part in match.groups())
    fields: dict[str, str] = {}
    count, size = 0, len(line)
    while line := _line(stream):
        count, size = count + 1, size + len(line)
        if count > _MAX_FIELDS:
            raise RefusedError(431, "too many header fields")
        if size > _MAX_HEAD:
            raise RefusedError(431, "the head is too long")
        name, colon, value = line.partition(b":")
        if not colon or not _FIELD_NAME.match(name):
            raise RefusedError(400, "a header field is malformed")
        key, text = name.decode("ascii").lower(), value.strip(b" \t").decode("latin-1")
        if key == "content-length" and fields.get(key, text) != text:
            raise RefusedError(400, "two lengths are given")
        repeated = key in fields and key != "content-length"
        # RFC 9110, section 5.2: fields of one name are one field.
        fields[key] = f"{fields[key]}, {text}" if repeated else text
    if line is None:
        return None
    options = {option.strip().lower() for option in fields.get("connection", "").split(",")}
    return Head(method, path, fields, "close" not in options if minor == "1" else "keep-alive" in options)


def _line(stream: BufferedIOBase) -> bytes | None:
    line = stream.readline(_MAX_LINE + 1)
    if len(line) > _MAX_LINE:
        raise RefusedError(431, "a line of the head is too long")
    if not line.endswith(b"\n"):
        return None
    return line[:-1].removesuffix(b"\r")


def answer(status: int, body: bytes, *, keep_alive: bool, head_only: bool = False) -> bytes:
    """The bytes of a whole answer with a JSON body; of its head alone for a HEAD (RFC 9110, section 9.3.2)."""
    head = (
        f"HTTP/1.1 {status} {REASONS.get(status, 'Error')}\r\n"
        "Content-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n"
        f"Connection: {'keep-alive' if keep_alive else 'close'}\r\n\r\n"
    )
    return head.encode("ascii") + (b"" if head_only else body)
