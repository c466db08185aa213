"""The HTTP server with handlers of the test: streams, clients that go or are slow, who may ask what."""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import select
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.support.waiting import wait_for

from kedge_agent.serving.handler import (
    EVENT_STREAM,
    Handler,
    Job,
    Request,
    Response,
    json_response,
    server_sent_event,
)
from kedge_agent.serving.http_server import HttpServer
from kedge_agent.serving.settings import ServerSettings, listening_socket
from kedge_agent.serving.worker_pool import WorkerPool
from kedge_protocol.errors import ConfigError, InputError

pytestmark = pytest.mark.device


class Echo(Handler):
    """Paths below ``/t``: each one tries something else."""

    def __init__(self) -> None:
        self.pool = WorkerPool("echo", threads=2, queue_limit=2, deadline=60.0, in_loop=True)
        self.hung = WorkerPool("hung", queue_limit=1, deadline=3.0, in_loop=True)
        self.let_go = threading.Event()
        self.threads: set[str] = set()
        self.given: queue.Queue[str] = queue.Queue()

    def methods(self, path: str) -> Sequence[str]:
        return () if path == "/t/none" else ("POST",) if path == "/t/post" else ("GET", "POST")

    def route(self, request: Request) -> Response | Job:
        name = request.path.rpartition("/")[2]
        if name == "now":
            return json_response(200, {"now": True})
        return Job(self.hung if name == "hang" else self.pool, lambda: getattr(self, name)(request))

    def post(self, request: Request) -> Response:
        self.threads.add(threading.current_thread().name)
        return Response(200, request.body, "application/octet-stream")

    def bad(self, request: Request) -> Response:
        raise InputError("not so")

    def broken(self, request: Request) -> Response:
        raise RuntimeError("a runtime says something")

    def hang(self, request: Request) -> Response:
        self.let_go.wait(60)
        return Response(200, b"late")

    late = hang
    """The same with a deadline that no busy machine reaches."""

    def events(self, request: Request) -> Response:
        return Response(200, stream=(server_sent_event(f"{n}\nx") for n in range(3)), content_type=EVENT_STREAM)

    def endless(self, request: Request) -> Response:
        def chunks() -> Iterator[bytes]:
            count = 0
            try:
                while True:
                    count += 1
                    yield bytes(1 << 15)
            finally:
                self.given.put(f"closed after {count}")

        return Response(200, stream=chunks())

    def half(self, request: Request) -> Response:
        def chunks() -> Iterator[bytes]:
            yield b"one"
            raise RuntimeError("in the middle")

        return Response(200, stream=chunks())


class Running:
    """A server in a thread."""

    def __init__(self, settings: ServerSettings, address: str = "127.0.0.1:0") -> None:
        self.handler = Echo()
        self.socket = listening_socket(address)
        self.server = self.made(settings)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()

    def made(self, settings: ServerSettings) -> HttpServer:
        return HttpServer([self.socket], [("/t", self.handler)], settings)

    @property
    def port(self) -> int:
        return int(self.socket.getsockname()[1])

    def raw(self, data: bytes = b"") -> socket.socket:
        link = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        link.sendall(data)
        return link

    def ask(self, method: str, path: str, body: bytes | None = None, **fields: str) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, {name.replace("_", "-"): text for name, text in fields.items()})
        return connection.getresponse()

    def wait_until_taken(self, link: socket.socket) -> None:
        """Wait until the server itself has a connection, not only the system."""
        ours = link.getsockname()
        wait_for(lambda: ours in [one._link.getpeername() for one in list(self.server._connections)])

    def stop(self) -> None:
        self.handler.let_go.set()
        self.server.stop()
        self.thread.join(60)
        assert not self.thread.is_alive()
        self.socket.close()


@pytest.fixture
def run() -> Iterator[Callable[..., Running]]:
    running: list[Running] = []

    def begin(address: str = "127.0.0.1:0", **changes: Any) -> Running:
        running.append(Running(ServerSettings(**changes), address))
        return running[-1]

    yield begin
    for one in running:
        one.stop()


GET = b"GET /t/%b HTTP/1.1\r\nHost: localhost\r\n\r\n"


def test_answers_errors_and_methods(run: Callable[..., Running]) -> None:
    server = run()
    assert server.ask("POST", "/t/post", b"abc").read() == b"abc"
    assert (server.ask("GET", "/t/bad").status, server.ask("GET", "/t/broken").status) == (400, 500)
    assert (server.ask("GET", "/t/none").status, server.ask("GET", "/elsewhere").status) == (404, 404)
    refused = server.ask("GET", "/t/post")
    assert (refused.status, refused.headers["Allow"]) == (405, "POST, OPTIONS")
    told = server.ask("OPTIONS", "/t/now")
    assert (told.status, told.headers["Allow"], told.read()) == (204, "GET, HEAD, POST, OPTIONS", b"")


def test_every_error_below_a_path_has_the_form_of_its_api(
    run: Callable[..., Running], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Echo, "error_content", lambda _, status, text: {"own": [status, text]}, raising=False)
    (tmp_path / "token").write_text("s3cret")
    server = run(max_body_bytes=100, token_file=str(tmp_path / "token"))

    def told(method: str, path: str, body: bytes | None = None, **fields: str) -> int:
        answer = server.ask(method, path, body, **{"Authorization": "Bearer s3cret", **fields})
        status, text = json.loads(answer.read())["own"]
        assert text
        assert status == answer.status
        return answer.status

    asked = [
        told("GET", "/t/none"),
        told("GET", "/t/post"),
        told("GET", "/t/bad"),
        told("GET", "/t/broken"),
        told("GET", "/t/hang"),
        told("GET", "/t/now", Authorization="Bearer another"),
        told("POST", "/t/post", bytes(101)),
        told("POST", "/t/post", b"x", Content_Encoding="gzip"),
    ]
    assert asked == [404, 405, 400, 500, 503, 401, 413, 400]
    request = b"GET /t/late HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: Bearer s3cret\r\n\r\n"
    late = [server.raw(request) for _ in range(8)]
    refused = select.select(late, [], [], 60)[0][0].makefile("rb").read()
    assert json.loads(refused.partition(b"\r\n\r\n")[2])["own"][0] == 429
    assert "error" in json.loads(server.ask("GET", "/elsewhere", Authorization="Bearer s3cret").read())
    for link in late:
        link.close()


def test_requests_sent_without_waiting_are_answered_in_their_order(run: Callable[..., Running]) -> None:
    server = run()
    posts = [b"POST /t/post HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\n%d" % n for n in range(9)]
    with server.raw(b"".join(posts) + b"GET /t/now HTTP/1.0\r\n\r\n") as link:
        answers = link.makefile("rb").read()
    bodies = [part.partition(b"\r\n\r\n")[2] for part in answers.split(b"HTTP/1.1 200 OK")[1:]]
    assert bodies == [*(b"%d" % n for n in range(9)), b'{"now":true}']


def test_a_client_that_has_sent_all_may_close_its_side(run: Callable[..., Running]) -> None:
    server = run()
    with server.raw(b"POST /t/post HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\nabc") as link:
        link.shutdown(socket.SHUT_WR)
        assert link.makefile("rb").read().endswith(b"\r\n\r\nabc")


def test_a_call_that_hangs_is_answered_in_time_and_others_go_on(run: Callable[..., Running]) -> None:
    server = run()
    waiting = [server.raw(GET % b"hang") for _ in range(4)]
    assert server.ask("GET", "/t/events").status == 200
    statuses = sorted(link.makefile("rb").readline().split()[1] for link in waiting)
    # One hangs and one waits for it: both run into their deadline. The queue has no place for the others.
    assert statuses == [b"429", b"429", b"503", b"503"]
    for link in waiting:
        link.close()


def test_short_calls_run_in_the_loop_and_a_long_one_among_them_keeps_nobody_waiting(
    run: Callable[..., Running],
) -> None:
    server = run()
    for _ in range(20):
        assert server.ask("POST", "/t/post", b"abc").read() == b"abc"
    # On a busy machine one of them may have seemed long, and the next one ran elsewhere.
    assert "kedge-loop" in server.handler.threads
    for _ in range(2):  # the loop is taken over, and over again
        with server.raw(GET % b"hang") as link:
            assert server.ask("GET", "/t/now").status == 200
            assert server.ask("POST", "/t/post", b"abc").read() == b"abc"
            assert link.recv(15) == b"HTTP/1.1 503 Se"
        server.handler.let_go.set()
        wait_for(lambda: not server.handler.hung.running)
        server.handler.let_go.clear()
    loops = [thread for thread in threading.enumerate() if thread.name == "kedge-loop"]
    assert len([thread for thread in loops if thread.is_alive()]) <= 2  # the last to hang may not have ended yet


def test_slow_clients_keep_nobody_waiting_and_are_let_go(run: Callable[..., Running]) -> None:
    server = run(head_seconds=3.0, body_seconds=3.0)
    slow = [server.raw(b"GET /t/now HTTP/1.1\r\nHost: lo") for _ in range(100)]
    slow += [server.raw(b"POST /t/post HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nx") for _ in range(100)]
    assert server.ask("GET", "/t/now").status == 200
    assert server.ask("POST", "/t/post", b"abc").read() == b"abc"
    for link in slow:
        assert link.recv(65536).startswith(b"HTTP/1.1 408 ")
        link.close()


def test_all_bodies_together_are_bound(run: Callable[..., Running]) -> None:
    server = run(all_bodies_bytes=1 << 20, max_body_bytes=1 << 20)
    part = b"POST /t/post HTTP/1.1\r\nHost: localhost\r\nContent-Length: 600000\r\n\r\n" + bytes(500_000)
    with server.raw(part) as held:
        wait_for(lambda: server.server.body_bytes >= 500_000)
        refused = server.ask("POST", "/t/post", bytes(600_000))
        assert (refused.status, refused.headers["Retry-After"]) == (503, "1")
        held.sendall(bytes(100_000))
        assert held.recv(15) == b"HTTP/1.1 200 OK"
    assert server.ask("POST", "/t/post", bytes(600_000)).status == 200
    assert server.server.body_bytes == 0


def test_a_picture_of_640_by_640_as_numbers_in_json_is_taken(run: Callable[..., Running]) -> None:
    # 1.2 million numbers, which Python writes with up to 17 digits each.
    assert run().ask("POST", "/t/post", bytes(25_000_000)).status == 200
    refused = run(max_body_bytes=100).ask("POST", "/t/post", bytes(101))
    assert refused.status == 413
    assert b"body_mib" in refused.read()


def test_the_largest_body_is_taken_though_all_together_may_be_fewer(run: Callable[..., Running]) -> None:
    assert run(max_body_bytes=2000, all_bodies_bytes=1000).ask("POST", "/t/post", bytes(2000)).status == 200


def test_a_stream_comes_in_chunks_and_ends(run: Callable[..., Running]) -> None:
    server = run()
    answer = server.ask("GET", "/t/events")
    assert answer.headers["Content-Type"] == "text/event-stream"
    assert answer.headers["Transfer-Encoding"] == "chunked"
    assert answer.read() == b"".join(b"data: %d\ndata: x\n\n" % n for n in range(3))
    with server.raw(b"GET /t/events HTTP/1.0\r\n\r\n") as old:
        head, _, body = old.makefile("rb").read().partition(b"\r\n\r\n")
    assert b"chunked" not in head
    assert body.startswith(b"data: 0")


def test_a_stream_waits_for_its_client_and_is_closed_with_it(run: Callable[..., Running]) -> None:
    server = run()
    link = socket.socket()
    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
    link.connect(("127.0.0.1", server.port))
    link.sendall(GET % b"endless")
    assert link.recv(100).startswith(b"HTTP/1.1 200 OK")
    with pytest.raises(queue.Empty):
        server.handler.given.get(timeout=0.5)
    link.close()
    count = int(server.handler.given.get(timeout=60).rpartition(" ")[2])
    # What the kernel's buffers and ours hold; without back-pressure there would be many thousands in that time.
    assert count < 400


def test_a_stream_that_fails_is_seen_to_be_incomplete(run: Callable[..., Running]) -> None:
    server = run()
    with pytest.raises(http.client.IncompleteRead):
        server.ask("GET", "/t/half").read()


def test_a_stopped_server_answers_what_it_has_accepted(run: Callable[..., Running]) -> None:
    server = run()
    with server.raw(GET % b"late") as link, server.raw() as idle:
        for one in (link, idle):
            server.wait_until_taken(one)
        wait_for(lambda: server.handler.pool.running)
        server.server.stop(60.0)
        server.handler.let_go.set()
        assert idle.recv(10) == b""
        answer = link.makefile("rb").read()
    assert answer.endswith(b"late")
    server.thread.join(60)
    assert not server.thread.is_alive()


def test_a_stopping_server_answers_requests_that_have_begun_to_arrive(run: Callable[..., Running]) -> None:
    server = run()
    request = b"GET /t/now HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    idle = server.raw(request)
    assert b"200" in idle.recv(4096)
    fresh, half = server.raw(), server.raw(request[:20])
    for link in (fresh, half):
        server.wait_until_taken(link)
    fresh.sendall(request)
    server.server.stop(60.0)
    assert idle.recv(10) == b""
    half.sendall(request[20:])
    for link in (fresh, half):
        received = b""
        while part := link.recv(4096):
            received += part
        assert received.startswith(b"HTTP/1.1 200")
        assert received.endswith(b"true}")
    server.thread.join(60)
    assert not server.thread.is_alive()


def test_a_unix_socket_serves_and_takes_the_place_of_a_dead_one(run: Callable[..., Running], tmp_path: Path) -> None:
    path = tmp_path / "kedge.sock"
    for _ in range(2):
        server = run(f"unix:{path}")
        with socket.socket(socket.AF_UNIX) as link:
            link.connect(str(path))
            link.sendall(GET % b"now")
            assert link.recv(4096).startswith(b"HTTP/1.1 200 OK")
        with pytest.raises(ConfigError, match="cannot be listened on"):
            listening_socket(f"unix:{path}")
        server.stop()


def test_tls_with_a_client_certificate(run: Callable[..., Running], tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(cert), "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-addext", "subjectAltName=DNS:localhost"], check=True, capture_output=True)
    server = run(tls_cert=str(cert), tls_key=str(key), tls_client_ca=str(cert))
    context = ssl.create_default_context(cafile=str(cert))
    with pytest.raises((ssl.SSLError, ConnectionError)):
        _over_tls(server.port, context, 10)
    context.load_cert_chain(cert, key)
    assert _over_tls(server.port, context, 3_000_000) == 3_000_000
    # One that never finishes its handshake keeps nobody waiting.
    with server.raw(b"\x16\x03"):
        assert _over_tls(server.port, context, 10) == 10


def _over_tls(port: int, context: ssl.SSLContext, size: int) -> int:
    connection = http.client.HTTPSConnection("localhost", port, timeout=60, context=context)
    with contextlib.closing(connection):
        connection.request("POST", "/t/post", bytes(size))
        return len(connection.getresponse().read())


def test_json_of_an_error_is_one_object(run: Callable[..., Running]) -> None:
    assert json.loads(run().ask("GET", "/t/bad").read()) == {"error": "not so"}
