"""Parses HTTP/1.1 requests (RFC 9112): heads in one pass, bodies with a length or in chunks, gzip and deflate.

The standard library's ``http.server`` imports the mail parser, ``ssl`` and more: 3.3 MiB of an agent that has 60.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import zlib

MAX_HEAD = 64 << 10
"""Largest size of a head in bytes, the request line included."""
_MAX_LINE = 16 << 10
_SHORT_HEAD = 1024
_MAX_FIELDS = 100
_MAX_CHUNK_LINE = 1 << 10
_LONGEST_NUMBER = 18
"""Digits: a number of thousands of them takes long to read."""
_REQUEST_LINE = re.compile(r"([A-Z]{1,16}) ([!-~]{1,8192}) HTTP/1\.([01])\Z")
_FIELD_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_ABSOLUTE = re.compile(r"https?://([^/?#]*)([^#]*)\Z", re.IGNORECASE)
_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})?")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?\Z")


class RefusedError(Exception):
    """A request that is refused before it is read to its end; the connection is closed after the answer.

    Args:
        status: status of the answer.
        text: what was wrong.
        fields: additional header fields of the answer.
    """

    def __init__(self, status: int, text: str, fields: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.fields = fields


@dataclass(slots=True)
class Head:
    """A request without its body.

    Attributes:
        path: percent-decoded, without the query.
        fields: header fields, names in lower case.
        authority: host and port that the client requests; None if an HTTP/1.0 request names none.
        keep_alive: whether the client wants to send another request on the connection.
        minor: 1 for HTTP/1.1.
        plain_length: bytes of a body that is neither chunked nor compressed nor announced by ``Expect``, 0 without a
            body; -1 for all others, see :func:`body_of`.
    """

    method: str
    path: str
    query: str
    fields: dict[str, str]
    authority: str | None
    keep_alive: bool
    minor: int
    plain_length: int


def parse_head(raw: bytes) -> Head:
    """Parse the head of a request. A client's next request usually has the same head: short ones are remembered, so
    nobody may change what is returned.

    Args:
        raw: the head up to the empty line, without it.

    Raises:
        RefusedError: it is not HTTP/1.x, malformed or too long.
    """
    return _remembered(raw) if len(raw) <= _SHORT_HEAD else _parsed(raw)


def _parsed(raw: bytes) -> Head:
    if raw.count(b"\n") != raw.count(b"\r\n") or raw.count(b"\r") != raw.count(b"\r\n"):
        raise RefusedError(400, "lines of a head end with CRLF")
    first, *lines = raw.decode("latin-1").split("\r\n")
    match = _REQUEST_LINE.match(first)
    if match is None:
        if len(first) > 8192:
            raise RefusedError(431, "the request line is too long")
        raise RefusedError(400, "not a request of HTTP/1.1")
    method, target, minor = match[1], match[2], int(match[3])
    if len(lines) > _MAX_FIELDS:
        raise RefusedError(431, "too many header fields")
    fields = _fields(lines)
    path, query, authority = _target(method, target, fields.get("host"))
    if minor == 1 and "host" not in fields:
        raise RefusedError(400, "an HTTP/1.1 request needs a Host field")
    connection = fields.get("connection")
    keep_alive = minor == 1
    if connection is not None:
        options = {option.strip().lower() for option in connection.split(",")}
        keep_alive = "close" not in options if minor == 1 else "keep-alive" in options
    return Head(method, path, query, fields, authority, keep_alive, minor, _plain_length(fields))


def _plain_length(fields: Mapping[str, str]) -> int:
    if "transfer-encoding" in fields or "content-encoding" in fields or "expect" in fields:
        return -1
    text = fields.get("content-length", "0")
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= _LONGEST_NUMBER else -1


_remembered = functools.lru_cache(64)(_parsed)


def _fields(lines: list[str]) -> dict[str, str]:
    fields: dict[str, str] = {}
    for line in lines:
        if len(line) > _MAX_LINE:
            raise RefusedError(431, "a line of the head is too long")
        name, colon, text = line.partition(":")
        if not colon or not _FIELD_NAME.match(name):
            raise RefusedError(400, "a header field is malformed")
        text = text.strip(" \t")
        if _CONTROL.search(text):
            raise RefusedError(400, "a header field holds a control character")
        key = name.lower()
        if key not in fields:
            fields[key] = text
        elif key == "content-length":
            if fields[key] != text:
                raise RefusedError(400, "two lengths are given")
        elif key == "host":
            raise RefusedError(400, "two Host fields are given")
        else:
            # RFC 9110, section 5.2: fields of one name are one field.
            fields[key] = f"{fields[key]}, {text}"
    return fields


def _target(method: str, target: str, host: str | None) -> tuple[str, str, str | None]:
    """Return path, query and authority of a target in origin-, absolute- or asterisk-form (RFC 9112, section 3.2)."""
    if target.startswith("/"):
        path, _, query = target.partition("?")
        authority = host
    elif target == "*" and method == "OPTIONS":
        return "*", "", host
    else:
        match = _ABSOLUTE.match(target)
        if match is None or not match[1]:
            raise RefusedError(400, "the request target is neither a path nor an http URL")
        authority = match[1]
        path, _, query = match[2].partition("?")
        path = path or "/"
    if "#" in path or "#" in query:
        raise RefusedError(400, "the request target has a fragment")
    return decoded_path(path) if "%" in path else path, query, authority


def decoded_path(path: str) -> str:
    """Return a path without its percent escapes.

    Raises:
        RefusedError: a malformed escape, or bytes that are not UTF-8.
    """

    def byte(match: re.Match[bytes]) -> bytes:
        if match[1] is None:
            raise RefusedError(400, "the path has a malformed escape")
        return bytes((int(match[1], 16),))

    try:
        return _ESCAPE.sub(byte, path.encode("latin-1")).decode("utf-8")
    except UnicodeDecodeError as error:
        raise RefusedError(400, "the path is not UTF-8") from error


def body_of(head: Head, limit: int) -> Body | None:
    """Return the reader of a request's body, or None if it has no body.

    Args:
        limit: largest size of the body in bytes.

    Raises:
        RefusedError: the body is too large, or in an unsupported form.
    """
    fields = head.fields
    coding = fields.get("transfer-encoding")
    text = fields.get("content-length")
    if coding is None and text is None:
        return None
    encoding = fields.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip", "x-gzip", "deflate"):
        raise RefusedError(415, "the Content-Encoding is none of gzip, deflate and identity")
    inflater = None if encoding == "identity" else Inflater(encoding, limit)
    if coding is not None:
        if text is not None or head.minor == 0:
            raise RefusedError(400, "a Transfer-Encoding does not go with a Content-Length, nor with HTTP/1.0")
        if coding.strip().lower() != "chunked":
            raise RefusedError(501, "the Transfer-Encoding is not 'chunked'")
        return ChunkedBody(limit, inflater)
    if text is None or not (text.isascii() and text.isdecimal()):
        raise RefusedError(400, "the Content-Length is no number")
    if len(text) > _LONGEST_NUMBER or int(text) > limit:
        raise _too_large(limit)
    length = int(text)
    return LengthBody(length, inflater) if length else None


class Body:
    """Reads one body piece by piece.

    Attributes:
        done: whether the body is complete.
        held: bytes that are now kept in memory.
    """

    done = False
    held = 0

    def feed(self, data: memoryview) -> int:
        """Consume the bytes that belong to the body and return their number.

        Raises:
            RefusedError: the body is too large or malformed.
        """
        raise NotImplementedError

    def content(self) -> bytes:
        """Return the complete body; to be called once, when :attr:`done`.

        Raises:
            RefusedError: the compressed data end too early.
        """
        raise NotImplementedError


class LengthBody(Body):
    """A body whose length is given."""

    def __init__(self, length: int, inflater: Inflater | None) -> None:
        self._left = length
        self._parts: list[bytes] = []
        self._inflater = inflater

    def feed(self, data: memoryview) -> int:
        taken = min(len(data), self._left)
        part = bytes(data[:taken])
        self._left -= taken
        if self._inflater is not None:
            part = self._inflater.inflate(part)
        _append(self._parts, part)
        self.held += len(part)
        self.done = not self._left
        return taken

    def content(self) -> bytes:
        return _joined(self._parts, self._inflater)


class ChunkedBody(Body):
    """A body in chunks (RFC 9112, section 7.1); trailers are ignored."""

    def __init__(self, limit: int, inflater: Inflater | None) -> None:
        self._limit = limit
        self._parts: list[bytes] = []
        self._inflater = inflater
        self._line = b""
        self._left = 0
        self._total = 0
        self._expects = "size"
        self._trailers = 0

    def feed(self, data: memoryview) -> int:
        at = 0
        while at < len(data) and not self.done:
            at += self._data(data[at:]) if self._expects == "data" else self._control(data[at:])
        return at

    def content(self) -> bytes:
        return _joined(self._parts, self._inflater)

    def _data(self, data: memoryview) -> int:
        taken = min(len(data), self._left)
        part = bytes(data[:taken])
        if self._inflater is not None:
            part = self._inflater.inflate(part)
        _append(self._parts, part)
        self.held += len(part)
        self._left -= taken
        if not self._left:
            self._expects = "end of chunk"
        return taken

    def _control(self, data: memoryview) -> int:
        """Consume bytes of a line, and act on it when it is complete."""
        room = _MAX_CHUNK_LINE - len(self._line)
        piece = bytes(data[:room])
        end = piece.find(b"\n")
        if end < 0:
            if len(piece) == room:
                raise RefusedError(400, "a line between chunks is too long")
            self._line += piece
            return len(piece)
        line = self._line + piece[: end + 1]
        self._line = b""
        if not line.endswith(b"\r\n"):
            raise RefusedError(400, "lines between chunks end with CRLF")
        self._on_line(line[:-2])
        return end + 1

    def _on_line(self, line: bytes) -> None:
        if self._expects == "size":
            match = _CHUNK_SIZE.match(line)
            if match is None:
                raise RefusedError(400, "the size of a chunk is malformed")
            self._left = int(match[1], 16)
            self._total += self._left
            if self._total > self._limit:
                raise _too_large(self._limit)
            self._expects = "data" if self._left else "trailer"
        elif self._expects == "end of chunk":
            if line:
                raise RefusedError(400, "a chunk is longer than it says")
            self._expects = "size"
        elif line:
            self._trailers += 1
            if self._trailers > _MAX_FIELDS:
                raise RefusedError(431, "too many trailers")
        else:
            self.done = True


class Inflater:
    """Decompresses a body, up to a limit."""

    def __init__(self, encoding: str, limit: int) -> None:
        self._gzip = encoding != "deflate"
        self._limit = limit
        self._total = 0
        self._object: zlib._Decompress | None = None

    def inflate(self, data: bytes) -> bytes:
        """Return the data that these bytes decompress to.

        Raises:
            RefusedError: the data are malformed, or larger than the limit.
        """
        import zlib

        if self._object is None and data:
            # "deflate" is the zlib format (RFC 9110, section 8.4.1.2), but some send the bare one.
            zlib_format = not self._gzip and data[0] & 0x0F == 8
            self._object = zlib.decompressobj(31 if self._gzip else 15 if zlib_format else -15)
        if self._object is None:
            return b""
        try:
            out = self._object.decompress(data, self._limit - self._total + 1)
        except zlib.error as error:
            raise RefusedError(400, "the compressed body is malformed") from error
        self._total += len(out)
        if self._total > self._limit or self._object.unconsumed_tail:
            raise _too_large(self._limit, " when it is decompressed")
        if self._object.unused_data:
            raise RefusedError(400, "something follows the compressed body")
        return out

    @property
    def complete(self) -> bool:
        """Return whether the compressed data are complete."""
        return self._object is not None and self._object.eof


def _too_large(limit: int, when: str = "") -> RefusedError:
    return RefusedError(413, f"the body is larger than {limit} bytes{when}, the most that this server takes (body_mib)")


def _append(parts: list[bytes], part: bytes) -> None:
    # Pieces of one byte each would cost fifty times their size as objects.
    if parts and len(part) < 1024 and len(parts[-1]) < 1 << 16:
        parts[-1] += part
    else:
        parts.append(part)


def _joined(parts: list[bytes], inflater: Inflater | None) -> bytes:
    if inflater is not None and not inflater.complete:
        raise RefusedError(400, "the compressed body ends too early")
    whole = parts[0] if len(parts) == 1 else b"".join(parts)
    parts.clear()
    return whole
