"""``kedge-agent serve`` in a process of its own."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.waiting import wait_for


class Served:
    """A running ``kedge-agent serve``."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self.killed = False
        output = process.stdout
        assert output is not None
        while not self.lines or "listening" not in self.lines[-1]:
            line = output.readline()
            assert line, "it ended"
            self.lines.append(line)
        found = re.search(r":(\d+)$", self.lines[-1].strip())
        self.port = int(found[1]) if found else 0

    def ask(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request(method, path, None if body is None else json.dumps(body))
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def send(self, path: str, raw: bytes, content_type: str) -> tuple[int, Any]:
        """POST bytes."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request("POST", path, raw, {"Content-Type": content_type})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def text(self, path: str) -> str:
        """GET a text."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request("GET", path)
            return connection.getresponse().read().decode()

    def kill(self) -> None:
        """SIGKILL the agent and its serving process."""
        child = self.child
        self.killed = True
        self.process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        self.process.wait()

    def wait(self, path: str = "/v2/health/ready") -> None:
        """Wait until a path is answered with 200; on a busy machine a process takes long to begin."""
        wait_for(lambda: self._is_well(path), 180, what=path)

    def _is_well(self, path: str) -> bool:
        with contextlib.suppress(TimeoutError):
            return self.ask("GET", path)[0] == 200
        return False

    @property
    def child(self) -> int:
        listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return int(listed.split()[0])


@contextlib.contextmanager
def serving(*arguments: str, proof: bool = False) -> Iterator[Served]:
    """Serve releases; without a proof, which takes seconds, as most tests want something else."""
    command = [sys.executable, "-u", "-m", "kedge_agent.cli", "serve", *arguments, *([] if proof else ["--no-proof"])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        served = Served(process)
        yield served
        if not served.killed:
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
