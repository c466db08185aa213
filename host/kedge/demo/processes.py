"""Real processes on loopback: started with their output in a log, ended with their parent."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from kedge_protocol.errors import KedgeError

T = TypeVar("T")


class DemoError(KedgeError):
    """A step did not go as it must; the message names the log to read."""


def say(text: str = "") -> None:
    """Print one line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(what: str, ready: Callable[[], T | None], *, seconds: float, every: float = 0.2) -> T:
    """Call ``ready`` until it gives something true.

    Raises:
        DemoError: it did not within ``seconds``.
    """
    end = time.monotonic() + seconds
    while not (found := ready()):
        if time.monotonic() > end:
            raise DemoError(f"{what}: not within {seconds:.0f} seconds")
        time.sleep(every)
    return found


def command_of(program: str) -> str:
    """The path of one of this environment's commands (``kedge``, ``kedge-agent``)."""
    return str(Path(sys.executable).parent / program)


def run(argv: Sequence[str], *, env: dict[str, str] | None = None, echo: bool = True) -> str:
    """Run a command to its end and give back what it printed.

    Raises:
        DemoError: it failed; the message holds what it printed.
    """
    if echo:
        say("$ " + " ".join([Path(argv[0]).name, *argv[1:]]))
    done = subprocess.run(list(argv), env={**os.environ, **(env or {})}, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DemoError(f"exit status {done.returncode}: {(done.stderr or done.stdout).strip()}", where=" ".join(argv))
    return done.stdout


class Process:
    """A process that runs beside: its output goes to ``log``.

    Args:
        argv: what to start.
        log: appended to, so that a restart is seen.
    """

    def __init__(self, argv: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None) -> None:
        self.argv = list(argv)
        self.log = log
        self.env = {**os.environ, **(env or {})}
        self._child: subprocess.Popen[bytes] | None = None

    def start(self) -> Process:
        """Start it, in a session of its own."""
        with self.log.open("ab") as output:
            self._child = subprocess.Popen(
                self.argv, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=self.env, start_new_session=True
            )
        return self

    @property
    def pid(self) -> int:
        """Its process id; 0 where it was not started."""
        return self._child.pid if self._child is not None else 0

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._child is not None and self._child.poll() is None

    def stop(self, *, seconds: float = 10.0) -> None:
        """SIGTERM, then SIGKILL for the whole session when it takes too long."""
        self._signal(signal.SIGTERM, group=False)
        try:
            if self._child is not None:
                self._child.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        self._signal(signal.SIGKILL, group=True)

    def kill(self) -> None:
        """SIGKILL of this one process, as a power cut would; its children must notice by themselves."""
        self._signal(signal.SIGKILL, group=False)
        if self._child is not None:
            self._child.wait()

    def _signal(self, number: signal.Signals, *, group: bool) -> None:
        if self._child is None:
            return
        try:
            (os.killpg if group else os.kill)(self._child.pid, number)
        except ProcessLookupError:
            return

    def tail(self, lines: int = 20) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) if self.log.exists() else ""


def ask(url: str, body: dict[str, Any] | None = None, *, seconds: float = 30.0) -> dict[str, Any]:
    """GET, or POST of a JSON body; the answer's JSON.

    Raises:
        DemoError: no connection, or a status that is an error (its text is in the message).
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=seconds) as response:
            answer: dict[str, Any] = json.load(response)
            return answer
    except urllib.error.HTTPError as error:
        raise DemoError(f"status {error.code}: {error.read().decode(errors='replace')}", where=url) from error
    except OSError as error:
        raise DemoError(str(error), where=url) from error
