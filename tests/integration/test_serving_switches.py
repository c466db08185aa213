"""Bundles switched under load, the serving process killed and stopped in between: each answer is checked against both
versions' own outputs."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.integration.test_serving_survives import GONE, Supervised, infer
from tests.support.bundles import make_bundle, samples
from tests.support.installed import install

from kedge_agent import Model

pytestmark = pytest.mark.device

CLIENTS = 8


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Callable[[Path], Supervised]]:
    started: list[Supervised] = []

    def start(release: Path) -> Supervised:
        install(tmp_path / "state", release)
        started.append(Supervised(tmp_path / "state", silence_seconds=5.0))
        started[0].wait(lambda: started[0].infer("tiny") == 200)
        return started[0]

    yield start
    for one in started:
        one.stop()


class Clients:
    """Clients that ask without a pause, each on a connection of its own."""

    def __init__(self, server: Supervised, expected: dict[str, np.ndarray]) -> None:
        self.answers = dict.fromkeys(expected, 0)
        self.wrong: list[object] = []
        self.gone = [0] * CLIENTS
        self._server, self._expected = server, expected
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(number,)) for number in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _work(self, number: int) -> None:
        connection, sample = self._server.connect(), samples(1)
        while not self._stop.is_set():
            try:
                status, answer = infer(connection, "tiny", sample)
            except GONE:
                self.gone[number] += 1
                connection.close()
                continue
            version = answer.get("model_version", "")
            if status == 200 and np.array_equal(np.float32(answer["outputs"][0]["data"]), self._expected[version]):
                self.answers[version] += 1
            else:
                self.wrong.append((status, answer))

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def usage(pid: int) -> tuple[int, int]:
    """MiB that belong to a process alone, and its descriptors that are not connections."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    kept = 0
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # it was closed meanwhile
            kept += not str(entry.readlink()).startswith("socket:")
    return int(found[1]) >> 10 if found else 0, kept


@pytest.mark.parametrize(("switches", "harms"), [(12, 1), pytest.param(1000, 20, marks=pytest.mark.campaign)])
def test_switches_lose_mix_and_mislabel_nothing(
    tmp_path: Path, server: Callable[[Path], Supervised], switches: int, harms: int
) -> None:
    releases = {f"{n}.0": make_bundle(tmp_path, version=f"{n}.0", seed=n) for n in range(2)}
    expected = {version: Model(path, target="generic-cpu")(samples(1)).ravel() for version, path in releases.items()}
    process = server(releases["0.0"])
    clients = Clients(process, expected)

    def switch(number: int) -> None:
        version = f"{number % 2}.0"
        before = clients.answers[version]
        install(tmp_path / "state", releases[version])
        process.wait(lambda: clients.answers[version] > before + CLIENTS)

    try:
        half = switches // 2
        for number in range(half):
            switch(number + 1)
            if number % (half // harms) == 0:
                for kind in (signal.SIGKILL, signal.SIGSTOP):
                    pid, answered = process.pid, sum(clients.answers.values())
                    os.kill(pid, kind)
                    process.wait(lambda pid=pid: process.supervisor.pid not in (None, pid))  # type: ignore[misc]
                    process.wait(lambda answered=answered: sum(clients.answers.values()) > answered + 50)  # type: ignore[misc]
        # The second half in one process: nothing piles up.
        pid, ours = process.pid, usage(os.getpid())[1]
        memory, descriptors = usage(pid)
        for number in range(half, switches):
            switch(number + 1)
        assert process.pid == pid
        assert usage(pid)[0] <= memory + 8
        assert usage(pid)[1] <= descriptors + 4  # the next bundle may be on its way
        assert usage(os.getpid())[1] <= ours + 2
    finally:
        clients.stop()
    assert not clients.wrong, clients.wrong[:3]
    # Of each kill or stop at most one request a client, that the process had accepted.
    assert max(clients.gone) <= len(process.words)
    assert len(process.words) >= 2 * harms
