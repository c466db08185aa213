"""Mutated requests: none is a server error, none hangs, and the memory is back at its base afterwards."""

from __future__ import annotations

import json
import random
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.test_serving_over_http import Child, tensor
from tests.support.bundles import make_bundle, samples
from tests.support.installed import install
from tests.support.waiting import wait_for

BODY = json.dumps(tensor(samples(2))).encode()
BINARY = b'{"inputs":[{"name":"input","datatype":"FP32","shape":[2,16],"parameters":{"binary_data_size":128}}]}'
HEADS = [
    b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n",
    b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n",
    b"POST /v2/repository/index HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n",
    b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: localhost\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n",
]
PIECES = [
    b"[", b"]", b"{", b"}", b'"', b",", b":", b"\\u0000", b"\\ud800", b"NaN", b"1e999", b"-0", b"true", b"null",
    b"\r\n", b"\0", b"\xff", b'"shape"', b'"BYTES"', b'"FP16"', b'"parameters":{"classification":3}', b"9" * 400,
]  # fmt: skip


def requests(chance: random.Random) -> Iterator[bytes]:
    """Valid requests with some of their bytes changed, endlessly."""
    while True:
        kind = chance.randrange(len(HEADS) + 1)
        if kind == len(HEADS):
            body = BINARY + samples(2).tobytes()
            head = b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: localhost\r\nInference-Header-Content-Length: %d\r\n"
            whole = head % len(BINARY) + b"Content-Length: %d\r\n\r\n" % len(body) + body
        else:
            body = mutated(BODY, chance)  # the length fits, so that what is within is read
            whole = HEADS[kind] % len(body) + body + (b"\r\n0\r\n\r\n" if kind == 1 else b"")
        yield mutated(whole, chance) if chance.random() < 0.5 else whole


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Some bytes are changed, taken out, doubled, or others put between them."""
    for _ in range(chance.randrange(1, 4)):
        at = chance.randrange(len(data) + 1)
        end = min(at + chance.randrange(1, 40), len(data))
        data = chance.choice(
            [
                data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :],
                data[:at] + data[end:],
                data[:end] + data[at:end] + data[end:],
                data[:at] + chance.choice(PIECES) + data[at:],
            ]
        )
    return data


def answers(port: int, data: bytes) -> bytes:
    """All that comes back before the server closes, or has answered everything that is whole."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as link:
        try:
            link.sendall(data)
            link.shutdown(socket.SHUT_WR)
            return link.makefile("rb").read()
        except (ConnectionResetError, BrokenPipeError):
            return b""


def memory(child: Child) -> int:
    """KiB that belong to the process alone."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{child.process.pid}/status").read_text())
    assert found is not None
    return int(found[1])


@pytest.mark.parametrize("count", [800, pytest.param(100_000, marks=pytest.mark.campaign)])
def test_no_mutated_request_is_a_server_error_or_hangs(tmp_path: Path, count: int) -> None:
    install(tmp_path / "state", make_bundle(tmp_path))
    child = Child(tmp_path / "state")
    try:
        stream = requests(random.Random(7))
        for _ in range(100):
            answers(child.port, next(stream))
        base = memory(child)
        seen: dict[int, int] = {}
        for _ in range(count):
            data = next(stream)
            for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answers(child.port, data)):
                seen[int(status)] = seen.get(int(status), 0) + 1
                assert int(status) < 500 or int(status) == 501, data
        assert seen[200] > count / 100
        assert seen[400] > count / 10
        assert child.ask("/v2/models/tiny/infer", tensor(samples(1)))[0] == 200
        wait_for(lambda: memory(child) <= base + 4096, what="the memory of the beginning")
    finally:
        child.stop()
