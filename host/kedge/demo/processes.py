"""Runs real processes on loopback: their output goes to a log, and they end with their parent."""

from __future__ import annotations

import contextlib
import json
import os
import random
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
    """A failed step of the demo; the message names the log to read."""


def say(text: str = "") -> None:
    """Print one line immediately."""
    write(text + "\n")


def write(text: str) -> None:
    """Print a piece of a line immediately."""
    sys.stdout.write(text)
    sys.stdout.flush()


def free_port() -> int:
    """Return a port of the loopback interface on which nobody is listening.

    It lies below the range from which Linux takes ports for outgoing connections (from 32768 on),
    so that no client takes it before its server starts.

    Raises:
        DemoError: no port could be found.
    """
    draw = random.SystemRandom()
    for _ in range(1000):
        port = draw.randrange(20000, 32768)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise DemoError("no port from 20000 to 32767 of 127.0.0.1 is free: stop what is listening there")


def wait_until(what: str, ready: Callable[[], T | None], *, seconds: float, every: float = 0.2) -> T:
    """Call ``ready`` until it returns something true, and return that.

    Raises:
        DemoError: that did not happen within ``seconds``.
    """
    end = time.monotonic() + seconds
    while not (found := ready()):
        if time.monotonic() > end:
            raise DemoError(f"{what}: not within {seconds:.0f} seconds")
        time.sleep(every)
    return found


def command_of(program: str) -> str:
    """Return the path of one of this environment's commands (``kedge``, ``kedge-agent``)."""
    return str(Path(sys.executable).parent / program)


def run(argv: Sequence[str], *, env: dict[str, str] | None = None, echo: bool = True) -> str:
    """Run a command to its end and return its output.

    Raises:
        DemoError: the command failed; the message holds its output.
    """
    if echo:
        say("$ " + " ".join([Path(argv[0]).name, *argv[1:]]))
    done = subprocess.run(list(argv), env={**os.environ, **(env or {})}, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DemoError(f"exit status {done.returncode}: {(done.stderr or done.stdout).strip()}", where=" ".join(argv))
    return done.stdout


class Process:
    """A background process whose output goes to ``log``.

    Args:
        argv: the command line.
        log: appended to, so that a restart is visible.
    """

    def __init__(self, argv: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None) -> None:
        self.argv = list(argv)
        self.log = log
        self.env = {**os.environ, **(env or {})}
        self._child: subprocess.Popen[bytes] | None = None

    def start(self) -> Process:
        """Start the process in its own session."""
        with self.log.open("ab") as output:
            self._child = subprocess.Popen(
                self.argv, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=self.env, start_new_session=True
            )
        return self

    @property
    def pid(self) -> int:
        """The process id; 0 if the process was not started."""
        return self._child.pid if self._child is not None else 0

    @property
    def running(self) -> bool:
        """Whether the process is still running."""
        return self._child is not None and self._child.poll() is None

    def stop(self, *, seconds: float = 10.0) -> None:
        """Send SIGTERM, then SIGKILL to the whole session if it takes too long."""
        self._signal(signal.SIGTERM, group=False)
        try:
            if self._child is not None:
                self._child.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        self._signal(signal.SIGKILL, group=True)

    def kill(self) -> None:
        """Send SIGKILL to this process only, like a power cut; its children must notice by themselves."""
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
        """Return the end of the process's log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) if self.log.exists() else ""


def ask(url: str, body: dict[str, Any] | None = None, *, seconds: float = 30.0) -> dict[str, Any]:
    """Send GET, or POST with a JSON body, and return the answer's JSON.

    Raises:
        DemoError: there is no connection, or the status is an error (its text is in the message).
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
