"""The serving process under its supervisor: killed, stopped, hanging, crashing, leaking; what clients see of it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.bundles import make_bundle, samples
from tests.support.installed import install
from tests.support.misbehaving import sitecustomize as misbehaving
from tests.support.waiting import wait_for

from kedge_agent.serving.settings import ServerSettings
from kedge_agent.serving.supervisor import ServingSupervisor
from kedge_protocol.mqtt import Backoff

pytestmark = pytest.mark.device

GONE = (ConnectionResetError, BrokenPipeError, http.client.BadStatusLine, http.client.IncompleteRead)
"""How a client sees that the process went with its request; a refused connection is not among them."""


class Supervised:
    """A supervisor that is polled in a thread of its own, as the agent polls it."""

    def __init__(self, state: Path, **options: Any) -> None:
        self.supervisor = ServingSupervisor(state, ["127.0.0.1:0"], backoff=Backoff(0.1, 1.0), **options)
        self.port = self.supervisor.listen()[0].getsockname()[1]
        self.words: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll)
        self._thread.start()

    def _poll(self) -> None:
        while not self._stop.wait(0.05):
            if self.supervisor.poll(time.monotonic()):
                self.words.append(self.supervisor.last_words)
        self.supervisor.stop()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def infer(self, model: str, first: float = 0.0) -> int:
        """The status of one call on a connection of its own; 0 where the process went with it."""
        array = samples(1)
        array[0, 0] = first
        try:
            return infer(self.connect(), model, array)[0]
        except GONE:
            return 0

    def wait(self, condition: Callable[[], object]) -> None:
        wait_for(condition, what=lambda: f"the condition, after {self.words},")

    @property
    def pid(self) -> int:
        self.wait(lambda: self.supervisor.pid)
        return self.supervisor.pid or 0


def infer(connection: http.client.HTTPConnection, model: str, array: np.ndarray[Any, Any]) -> tuple[int, Any]:
    tensor = {"name": "input", "datatype": "FP32", "shape": list(array.shape), "data": array.ravel().tolist()}
    connection.request("POST", f"/v2/models/{model}/infer", json.dumps({"inputs": [tensor]}))
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


@pytest.fixture
def supervised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Supervised]]:
    folder = str(Path(misbehaving.__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")]))
    for name in ("bad", "good"):
        install(tmp_path / "state", make_bundle(tmp_path, name))
    started: list[Supervised] = []

    def start(**options: Any) -> Supervised:
        one = Supervised(tmp_path / "state", **options)
        started.append(one)
        one.wait(lambda: one.infer("good") == one.infer("bad") == 200)
        return one

    yield start
    for one in started:
        one.stop()


def test_killed_under_load_only_what_it_had_accepted_fails(supervised: Callable[..., Supervised]) -> None:
    server = supervised()
    stop = threading.Event()
    statuses: list[int] = []
    failures: list[BaseException] = []

    def work() -> None:
        connection = server.connect()
        while not stop.is_set():
            try:
                statuses.append(infer(connection, "good", samples(1))[0])
            except GONE as error:
                failures.append(error)
                connection.close()

    clients = [threading.Thread(target=work) for _ in range(4)]
    for client in clients:
        client.start()
    kills = 4  # more than the crashes for which a bundle is left out
    for _ in range(kills):
        before, pid = len(statuses), server.pid
        os.kill(pid, signal.SIGKILL)
        server.wait(lambda pid=pid: server.supervisor.pid not in (None, pid))  # type: ignore[misc]
        server.wait(lambda before=before: statuses[before:].count(200) > 20)  # type: ignore[misc]
    stop.set()
    for client in clients:
        client.join()
    # Connections are taken when the models are loaded: nobody is refused, or told to come again.
    assert set(statuses) == {200}
    assert len(failures) <= kills * len(clients)
    assert len(server.words) == kills


def test_a_stopped_process_is_noticed_and_who_waits_is_answered_by_the_next(
    supervised: Callable[..., Supervised],
) -> None:
    server = supervised(silence_seconds=5.0)
    for count in range(1, 4):  # as often as a bundle that crashes is called before it is left out
        os.kill(server.pid, signal.SIGSTOP)
        statuses: list[int] = []
        client = threading.Thread(target=lambda statuses=statuses: statuses.append(server.infer("good")))
        client.start()
        server.wait(lambda count=count: len(server.words) == count)  # type: ignore[misc]
        assert "was stopped from outside, gave no sign of life" in server.words[-1]
        client.join()
        assert statuses in ([0], [200])
        server.wait(lambda: server.infer("good") == 200)
    assert not server.supervisor.left_out


def test_a_runtime_that_hangs_is_cut_off_and_others_go_on(supervised: Callable[..., Supervised]) -> None:
    server = supervised(settings=ServerSettings(call_seconds=5.0))
    pid = server.pid
    hanging: list[int] = []
    client = threading.Thread(target=lambda: hanging.append(server.infer("bad", misbehaving.HANG)))
    client.start()
    assert server.infer("good") == 200
    client.join()
    assert hanging in ([503], [0])
    server.wait(lambda: server.words)
    assert "a runtime hangs, during calls of bad" in server.words[0]
    server.wait(lambda: server.supervisor.pid not in (None, pid))
    server.wait(lambda: server.infer("bad") == server.infer("good") == 200)


def test_a_bundle_that_crashes_its_runtime_again_and_again_is_left_out(supervised: Callable[..., Supervised]) -> None:
    server = supervised()
    for count in range(1, 4):
        assert server.infer("bad", misbehaving.CRASH) == 0
        server.wait(lambda count=count: len(server.words) == count)  # type: ignore[misc]
        assert "SIGSEGV, during calls of bad" in server.words[-1]  # and of good, if that one was still sending
        server.wait(lambda: server.infer("good") == 200)
    assert list(server.supervisor.left_out.values()) == ["bad"]
    server.wait(lambda: server.infer("bad") == 503)
    assert server.infer("good") == 200
    said = server.supervisor.said("bad")
    assert said is not None
    assert "taken the serving process down" in str(said.error)


def test_a_runtime_that_leaks_is_replaced_without_a_failed_request(supervised: Callable[..., Supervised]) -> None:
    server = supervised(memory_bytes=220 << 20)
    while not server.words:
        assert server.infer("bad", misbehaving.LEAK) in (200, 503)
    assert "took more than 220 MiB" in server.words[0]
    server.wait(lambda: server.infer("good") == 200)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_calls_of_one_model_run_side_by_side_where_there_are_cores(supervised: Callable[..., Supervised]) -> None:
    server = supervised()
    statuses: list[int] = []

    def work() -> None:
        # Its call ends once another one has begun.
        statuses.append(server.infer("bad", misbehaving.MEET))

    clients = [threading.Thread(target=work) for _ in range(2)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert statuses == [200, 200]
