"""The serving child as the agent starts it: a real process, real sockets, a models folder that changes under it."""

from __future__ import annotations

import gzip
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.bundles import make_bundle, make_tflite_bundle, samples
from tests.support.installed import install
from tests.support.waiting import wait_for

from kedge_agent.counters import collect
from kedge_agent.serving import http_parser
from kedge_agent.serving.settings import ServerSettings
from kedge_agent.slots import ModelFolder

pytestmark = pytest.mark.device

BOMB = gzip.compress(bytes(ServerSettings().max_body_bytes + 1))


class Child:
    """``python -m kedge_agent.serving`` on a free port."""

    def __init__(self, state: Path, *options: str) -> None:
        state.mkdir(exist_ok=True)
        self.log = state.parent / "serving.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "kedge_agent.serving",
                    "--state",
                    str(state),
                    "--listen",
                    "127.0.0.1:0",
                    *options,
                ],
                stderr=log,
            )
        self.port = 0
        wait_for(self._listens)

    def _listens(self) -> bool:
        found = re.search(r"listening on http://127\.0\.0\.1:(\d+)", self.log.read_text())
        self.port = int(found[1]) if found else 0
        assert self.process.poll() is None, self.log.read_text()
        return bool(found)

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def ask(self, path: str, body: object = None) -> tuple[int, Any]:
        return ask(self.connect(), path, body)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def ask(connection: http.client.HTTPConnection, path: str, body: object = None) -> tuple[int, Any]:
    """One request; a body makes it a POST."""
    if body is None:
        connection.request("GET", path)
    else:
        connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body).encode())
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def tensor(array: np.ndarray[Any, Any]) -> dict[str, Any]:
    """A request with one FP32 input."""
    data = array.ravel().tolist()
    return {"inputs": [{"name": "input", "datatype": "FP32", "shape": list(array.shape), "data": data}]}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Child]]:
    children: list[Child] = []

    def begin(*options: str) -> Child:
        children.append(Child(tmp_path / "state", *options))
        return children[-1]

    yield begin
    for child in children:
        child.stop()


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    """A child without models, for all tests that ask for no more than HTTP."""
    child = Child(tmp_path_factory.mktemp("empty") / "state")
    wait_for(lambda: child.ask("/v2/health/ready")[0] == 200)
    yield child
    assert child.process.poll() is None
    child.stop()


def test_a_model_is_served_counted_and_announced(tmp_path: Path, start: Callable[..., Child]) -> None:
    folder = install(tmp_path / "state", make_bundle(tmp_path))
    child = start()
    wait_for(lambda: child.ask("/v2/health/ready")[0] == 200)
    said, current = folder.serving(), folder.current()
    assert said is not None
    assert current is not None
    assert (said.digest, said.pid, said.error) == (current.digest, child.process.pid, None)
    connection = child.connect()
    for _ in range(20):
        status, answer = ask(connection, "/v2/models/tiny/infer", tensor(samples(2)))
        assert status == 200
        assert answer["outputs"][0]["shape"] == [2, 4]
    assert ask(connection, "/v2/models/tiny/infer", {})[0] == 400
    assert collect(folder.counters).inferences == 20
    child.process.send_signal(signal.SIGTERM)
    assert child.process.wait(60) == 0


def test_the_models_folder_is_followed(tmp_path: Path, start: Callable[..., Child]) -> None:
    state = tmp_path / "state"
    child = start()
    wait_for(lambda: child.ask("/v2/health/ready")[0] == 200)
    assert child.ask("/v2/models/tiny")[0] == 404
    folder = install(state, make_bundle(tmp_path, version="1.0"))
    wait_for(lambda: child.ask("/v2/models/tiny")[0] == 200)
    install(state, make_bundle(tmp_path, version="2.0", seed=1))
    wait_for(lambda: child.ask("/v2/models/tiny")[1]["versions"] == ["2.0"])
    assert child.ask("/v2/models/tiny/versions/1.0/infer", tensor(samples(1)))[0] == 404
    folder.remove()
    wait_for(lambda: child.ask("/v2/models/tiny")[0] == 404)


def test_a_bundle_that_cannot_be_loaded_is_announced_and_takes_nothing_down(
    tmp_path: Path, start: Callable[..., Child]
) -> None:
    state = tmp_path / "state"
    install(state, make_bundle(tmp_path, "good"))
    bad = install(state, make_bundle(tmp_path, "bad", broken="file"))
    child = start()
    wait_for(lambda: bad.serving() is not None)
    said = bad.serving()
    assert said is not None
    assert "refuses the file" in str(said.error)
    wait_for(lambda: child.ask("/v2/models/good/infer", tensor(samples(1)))[0] == 200)
    assert child.ask("/v2/models/bad/infer", tensor(samples(1)))[0] == 503
    # The next bundle may be good, and one after that bad again: the good one goes on.
    good = install(state, make_bundle(tmp_path, "bad", version="2.0"))
    wait_for(lambda: child.ask("/v2/models/bad/infer", tensor(samples(1)))[0] == 200)
    install(state, make_bundle(tmp_path, "bad", version="3.0", broken="file", seed=3))
    current = good.current()
    assert current is not None
    wait_for(lambda: (now := good.serving()) is not None and now.digest == current.digest)
    assert "refuses the file" in str(ModelFolder(state, "bad").serving())
    assert child.ask("/v2/models/bad")[1]["versions"] == ["2.0"]
    good.roll_back()
    wait_for(lambda: (now := good.serving()) is not None and now.error is None)


def test_no_request_is_lost_while_bundles_are_switched(tmp_path: Path, start: Callable[..., Child]) -> None:
    state = tmp_path / "state"
    releases = [make_bundle(tmp_path, version=f"{n}.0", seed=n) for n in range(3)]
    install(state, releases[0])
    child = start()
    wait_for(lambda: child.ask("/v2/health/ready")[0] == 200)
    stop = threading.Event()
    statuses: list[int] = []

    def work() -> None:
        connection = child.connect()
        while not stop.is_set():
            statuses.append(ask(connection, "/v2/models/tiny/infer", tensor(samples(1)))[0])

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in (1, 2, 0, 1):
        install(state, releases[number])
        wait_for(lambda wanted=f"{number}.0": child.ask("/v2/models/tiny")[1]["versions"] == [wanted])
    stop.set()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200}
    folder = ModelFolder(state, "tiny")
    found = collect(folder.counters)
    assert (found.inferences, found.errors) == (len(statuses), 0)


def test_a_body_that_is_too_large_is_refused_and_seen(tmp_path: Path, start: Callable[..., Child]) -> None:
    install(tmp_path / "state", make_bundle(tmp_path))
    child = start("--settings", '{"max_body_bytes":100000}')
    wait_for(lambda: child.ask("/v2/health/ready")[0] == 200)
    status, answer = child.ask("/v2/models/tiny/infer", b" " * 5_000_000)
    assert status == 413
    assert "100000" in answer["error"]
    assert child.ask("/v2/models/tiny/infer", tensor(samples(1)))[0] == 200


HOST = b"Host: localhost\r\n"
ONE = b"GET /v2 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
POST = b"POST /v2/models/x/infer HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
GZIP = POST + b"Content-Encoding: gzip\r\n"


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /v2 HTTP/2.0\r\n\r\n", 400),
        (b"GET /v2 HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (b"GET /v2 HTTP/1.1\r\nfolded: a\r\n b\r\n\r\n", 400),
        (b"GET /v2 HTTP/1.1\nHost: localhost\n\n", 400),
        (b"GET /v2 HTTP/1.1\r\nA: b\rc\r\n" + HOST + b"\r\n", 400),
        (b"GET /v2 HTTP/1.1\r\nA: b\0c\r\n" + HOST + b"\r\n", 400),
        (b"GET /v2 HTTP/1.1\r\n\r\n", 400),
        (b"GET /v2 HTTP/1.1\r\n" + HOST + HOST + b"\r\n", 400),
        (b"GET /%zz HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"GET v2 HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"POST /v2 HTTP/1.1\r\n" + HOST + b"Content-Length: x\r\n\r\n", 400),
        (b"POST /v2 HTTP/1.1\r\n" + HOST + b"Content-Length: -1\r\n\r\n", 400),
        (b"POST /v2 HTTP/1.1\r\n" + HOST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"POST /v2 HTTP/1.1\r\n" + HOST + b"Content-Length: 99999999999999999999\r\n\r\n", 413),
        (b"POST /v2 HTTP/1.1\r\n" + HOST + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST /v2 HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 501),
        (b"POST /v2 HTTP/1.1\r\n" + HOST + b"Content-Encoding: br\r\nContent-Length: 1\r\n\r\nx", 415),
        (b"POST /v2 HTTP/1.1\r\n" + HOST + b"Expect: wonders\r\nContent-Length: 1\r\n\r\nx", 417),
        (b"GET /" + b"x" * 20000 + b" HTTP/1.1\r\n\r\n", 431),
        (b"GET /v2 HTTP/1.1\r\n" + b"".join(b"f%d: x\r\n" % i for i in range(200)) + b"\r\n", 431),
        (b"GET /v2 HTTP/1.1\r\nHost: evil.example\r\n\r\n", 421),
        (b"GET http://evil.example/v2 HTTP/1.1\r\n" + HOST + b"\r\n", 421),
        (b"GET http://localhost:80/v2 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 200),
        (b"GET /%76%32?x=1 HTTP/1.1\r\nHost: 127.0.0.1:8080\r\nConnection: close\r\n\r\n", 200),
        (b"\r\n" + ONE + b"\r\n", 200),
        (b"GET /v2 HTTP/1.0\r\n\r\n", 200),
        (ONE + b"\r\n", 200),
        (POST + b"Content-Length: 0\r\n\r\n", 404),
        (CHUNKED + b"0\r\n\r\n", 404),
        (CHUNKED + b"3;a=b\r\nabc\r\n0\r\nTrailer: x\r\n\r\n", 404),
        (CHUNKED + b"3\r\nabcd\r\n0\r\n\r\n", 400),
        (CHUNKED + b"-1\r\n", 400),
        (CHUNKED + b"fffffffff\r\n", 413),
        (GZIP + b"Content-Length: %d\r\n\r\n" % len(gzip.compress(b"x")) + gzip.compress(b"x"), 404),
        (GZIP + b"Content-Length: 1\r\n\r\nx", 400),
        (GZIP + b"Content-Length: %d\r\n\r\n" % len(BOMB) + BOMB, 413),
        (b"PUT /v2 HTTP/1.1\r\nConnection: close\r\n" + HOST + b"\r\n", 405),
    ],
)
def test_what_http_allows_and_what_not(empty: Child, raw: bytes, status: int) -> None:
    with socket.create_connection(("127.0.0.1", empty.port), timeout=60) as connection:
        connection.sendall(raw)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert b"Connection: close" in head
    assert ("error" in json.loads(body)) == (status != 200)


def test_of_too_many_connections_the_one_that_is_idle_longest_makes_room(start: Callable[..., Child]) -> None:
    child = start("--settings", '{"connections":8}')
    held = [socket.create_connection(("127.0.0.1", child.port)) for _ in range(8)]
    for connection in held:
        connection.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    assert child.ask("/v2")[0] == 200
    assert held[0].recv(4096) == b""
    held[7].sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert held[7].recv(4096).startswith(b"HTTP/1.1 200")
    for connection in held:
        connection.close()


def test_a_client_that_waits_for_permission_gets_it(tmp_path: Path, start: Callable[..., Child]) -> None:
    install(tmp_path / "state", make_bundle(tmp_path))
    child = start()
    wait_for(lambda: child.ask("/v2/health/ready")[0] == 200)
    body = json.dumps(tensor(samples(1))).encode()
    line = "POST /v2/models/tiny/infer HTTP/1.1\r\nHost: localhost\r\n"
    head = f"{line}Expect: 100-continue\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", child.port), timeout=60) as connection:
        connection.sendall(head.encode())
        assert connection.recv(4096) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert connection.recv(4096).startswith(b"HTTP/1.1 200 OK\r\n")


def test_a_port_that_is_taken_is_one_clear_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        listen = f"127.0.0.1:{other.getsockname()[1]}"
        done = subprocess.run(
            [sys.executable, "-m", "kedge_agent.serving", "--state", str(tmp_path), "--listen", listen],
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
    assert done.returncode == 2
    assert listen in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.shared_data
def test_the_child_stays_lean_with_a_model_loaded_and_called(
    tmp_path: Path, shared_data: Path, start: Callable[..., Child]
) -> None:
    """Anonymous memory: what this process alone costs, whatever else maps the same libraries."""
    with np.load(shared_data / "eval" / "ic.npz") as data:
        images = data["input"][:8]
    model = shared_data / "models" / "ic_resnet8_int8.tflite"
    install(tmp_path / "state", make_tflite_bundle(tmp_path, model, images, "ic"), "rpi4")
    child = start()
    wait_for(lambda: child.ask("/v2/health/ready")[0] == 200)
    connection = child.connect()
    for image in images:
        assert ask(connection, "/v2/models/ic/infer", tensor(image))[0] == 200
    status = Path(f"/proc/{child.process.pid}/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found is not None
    assert int(found[1]) < 32 * 1024


def raw(child: Child, data: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", child.port), timeout=60)
    connection.sendall(data)
    return connection


def test_a_head_request_has_the_head_alone_on_a_connection_that_stays(empty: Child) -> None:
    child = empty
    paths = {"/v2": 200, "/v2/health/live": 200, "/v2/models/none": 404, "/nowhere": 404}
    connection = child.connect()
    for path, status in paths.items():
        connection.request("HEAD", path)
        head = connection.getresponse()
        assert (head.status, head.read()) == (status, b"")
        connection.request("GET", path)
        answer = connection.getresponse()
        assert (answer.status, len(answer.read())) == (status, int(head.headers["Content-Length"]))
    with raw(child, b"HEAD /v2 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n") as refused:
        assert refused.makefile("rb").read().endswith(b"\r\n\r\n")


@pytest.mark.parametrize("line", [b"A: b\r\n", b"A: " + b"b" * 900 + b"\r\n", b"Connection: keep-alive\r\n"])
def test_a_head_is_bound_in_fields_and_bytes(empty: Child, line: bytes) -> None:
    child = empty
    count = 101 if len(line) < 900 else 80
    with raw(child, b"GET /v2 HTTP/1.1\r\nHost: localhost\r\n" + line * count + b"\r\n") as connection:
        assert connection.makefile("rb").readline().startswith(b"HTTP/1.1 431 ")
    with raw(
        child, b"GET /v2 HTTP/1.1\r\nHost: localhost\r\n" + line * 60 + b"Connection: close\r\n\r\n"
    ) as connection:
        assert connection.makefile("rb").readline().startswith(b"HTTP/1.1 200 ")


def test_fields_of_one_name_are_one_field() -> None:
    lines = ("GET / HTTP/1.1", "Host: x", "Connection: x", "A: 1", "Connection: close", "A: 2")
    head = http_parser.parse_head("\r\n".join([*lines, *["Content-Length: 0"] * 2]).encode())
    assert (head.fields["a"], head.keep_alive, http_parser.body_of(head, 10)) == ("1, 2", False, None)
