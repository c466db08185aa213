"""Requests taken out of a connection's bytes: the same ones, however the bytes arrive."""

from __future__ import annotations

import zlib
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kedge_agent.serving.http_parser import RefusedError
from kedge_agent.serving.request_reader import Received, RequestReader
from kedge_agent.serving.settings import ServerSettings

pytestmark = pytest.mark.device

LIMIT = 300
ALL_TOGETHER = 500


class Server:
    """What a reader asks of its server."""

    def __init__(self, held: int = 0) -> None:
        self.settings = ServerSettings(max_body_bytes=LIMIT)
        self.held = held
        self.access = self

    def admit(self, head: Any, *, by_name: bool) -> None:
        if head.path == "/secret":
            raise RefusedError(401, "not you")

    def hold(self, change: int) -> bool:
        self.held += change
        return change <= 0 or self.held <= ALL_TOGETHER


Outcome = tuple[list[tuple[str, str, bytes, int]], int, bool, int]


def read(pieces: list[bytes], *, held: int = 0, ever_at_once: bool = True) -> Outcome:
    """Return what is received, the status of a refusal or 0, whether a request is still incomplete, and the bytes that
    are held in the end once all complete requests are answered."""
    server = Server(held)
    reader = RequestReader(cast(Any, server), lambda waits: None)
    found: list[tuple[str, str, bytes, int]] = []

    def keep(received: Received) -> None:
        found.append((received.head.method, received.head.path, received.body, received.held))
        server.hold(-received.held)

    status = 0
    try:
        for piece in pieces:
            if ever_at_once and not reader.begun and (received := reader.at_once(memoryview(piece))):
                keep(received)
                continue
            reader.take(memoryview(piece))
            while received := reader.next():
                keep(received)
    except RefusedError as refused:
        status = refused.status
        reader.drop()
    begun = reader.begun
    return found, status, begun, server.held


def request(target: str, fields: list[str], body: bytes) -> bytes:
    return "\r\n".join([f"POST {target} HTTP/1.1", "Host: x", *fields, "\r\n"]).encode() + body


def chunked(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n"


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    body = draw(st.binary(max_size=400))
    target = draw(st.sampled_from(["/a", "/v2/models/x/infer", "/secret", "/%zz", "x"]))
    shape = draw(st.sampled_from(["length", "length", "length", "none", "chunks", "gzip", "expect", "wrong", "two"]))
    start = b"\r\n" if draw(st.integers(0, 9)) == 0 else b""
    length = f"Content-Length: {len(body)}"
    if shape == "none":
        return start + request(target, [], b"")
    if shape == "chunks":
        return start + request(target, ["Transfer-Encoding: chunked"], chunked(body))
    if shape == "gzip":
        body = zlib.compress(body)
        return start + request(target, ["Content-Encoding: deflate", f"Content-Length: {len(body)}"], body)
    if shape == "expect":
        return start + request(target, [draw(st.sampled_from(["Expect: 100-continue", "Expect: cake"])), length], body)
    if shape == "wrong":
        text = draw(st.sampled_from(["-1", "1x", "", "9" * 30, "+5", "٣"]))
        return start + f"POST {target} HTTP/1.1\r\nHost: x\r\nContent-Length: {text}\r\n\r\n".encode() + body
    return start + request(target, [length, length] if shape == "two" else [length], body)


@given(st.lists(requests(), min_size=1, max_size=4), st.data())
def test_requests_are_the_same_however_their_bytes_arrive(sent: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True) if a < b]
    expected = read([whole], ever_at_once=False)
    for arrived in ([whole], pieces, sent):
        found, status, begun, held = read(arrived)
        assert (found, status, begun) == expected[:3]
        assert held == 0 or begun
    assert expected[3] == 0 or expected[2]


def test_a_whole_request_that_is_too_much_for_all_together_is_refused_and_lets_go() -> None:
    whole = request("/a", ["Content-Length: 200"], bytes(200))
    for arrived in ([whole], [whole[:-1], whole[-1:]]):
        assert read(arrived, held=400) == ([], 503, False, 400)


def test_one_that_came_whole_is_taken_in_one_step() -> None:
    server = Server()
    reader = RequestReader(cast(Any, server), lambda waits: None)
    received = reader.at_once(memoryview(request("/a", ["Content-Length: 3"], b"abc")))
    assert received is not None
    assert (received.body, received.held, server.held, reader.begun) == (b"abc", 3, 3, False)
