"""A controller as its users run it: a process of its own, on a state folder and a broker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.support.waiting import wait_for


class ControllerProcess:
    """``kedge controller run``; a context manager that ends what :meth:`start` started.

    Args:
        state: the state folder.
        options: of the command.
    """

    def __init__(self, state: Path, *options: str) -> None:
        self.log = state.parent / f"{state.name}-controller.log"
        self._command = [sys.executable, "-m", "kedge.cli.main", "controller", "run", "--state", str(state), *options]
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ControllerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self.running:
            self.kill()

    def start(self, *, connected: bool = True) -> None:
        """Start it; with ``connected``, wait until it says that it is at the broker."""
        with self.log.open("ab") as output:
            before = output.tell()
            environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
            self.process = subprocess.Popen(self._command, stdout=output, stderr=output, env=environment)
        if connected:
            wait_for(lambda: "connected to" in self.text(before), what=f"a connected controller (see {self.log})")

    def text(self, after: int = 0) -> str:
        """What it logged, from a position on."""
        return self.log.read_bytes()[after:].decode(errors="replace")

    @property
    def running(self) -> bool:
        """Whether it runs."""
        return self.process is not None and self.process.poll() is None

    def wait(self, timeout: float = 60.0) -> int:
        """Wait for it to end by itself; returns the exit status."""
        if self.process is None:
            raise RuntimeError("the controller was not started")
        return self.process.wait(timeout)

    def kill(self) -> None:
        """SIGKILL."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def terminate(self, timeout: float = 60.0) -> int:
        """SIGTERM; returns the exit status."""
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
        return self.wait(timeout)
