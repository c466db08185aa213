"""The serving process, started and watched by the agent: a model that crashes its runtime takes this child down, and
nothing else."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

from kedge_protocol.mqtt import Backoff
from kedge_targets.worker import bootstrap

log = logging.getLogger(__name__)

STABLE_SECONDS = 30.0
"""A child that lived this long ends the row of deaths."""
PATIENCE = 5.0
"""Seconds that it has to end by itself."""


class ServingChild:
    """One child, restarted with back-off.

    Linux kills it when the *thread* that started it ends, so :meth:`poll` belongs to the main thread.

    Args:
        state: the agent's state folder.
        listen: ``host:port``.
    """

    def __init__(self, state: Path, listen: str, *, backoff: Backoff | None = None) -> None:
        self.deaths = 0
        """In a row."""
        self.last_words = ""
        self._command = [
            sys.executable,
            str(Path(bootstrap.__file__).resolve()),
            "--module",
            "kedge_agent.serving",
            "--state",
            str(state),
            "--listen",
            listen,
        ]
        self._backoff = backoff or Backoff(0.5, 30.0)
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._next_start = 0.0

    @property
    def pid(self) -> int | None:
        """Of the running child."""
        return None if self._process is None else self._process.pid

    def poll(self, now: float) -> bool:
        """Start it where it does not run and its time has come.

        Returns:
            Whether it was found dead since the last call.
        """
        died = False
        if self._process is not None:
            status = self._process.poll()
            if status is None:
                if self.deaths and now - self._started_at > STABLE_SECONDS:
                    self.deaths = 0
                    self._backoff.reset()
                return False
            died = True
            self.deaths += 1
            self.last_words = _words(status)
            self._process = None
            delay = self._backoff.next()
            self._next_start = now + delay
            log.error("the serving process %s; again in %.1f s", self.last_words, delay)
        if now >= self._next_start:
            self._start(now)
        return died

    def stop(self) -> None:
        """End it: politely, then not."""
        process = self._process
        self._process = None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _start(self, now: float) -> None:
        environment = {**os.environ, bootstrap.PARENT_VARIABLE: str(os.getpid())}
        # Only the agent itself speaks to the service manager.
        for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
            environment.pop(name, None)
        try:
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, env=environment)
        except OSError as error:
            self.deaths += 1
            self.last_words = f"cannot be started: {error.strerror}"
            self._next_start = now + self._backoff.next()
            return
        self._started_at = now


def _words(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-status).name}"
    return f"was killed by signal {-status}"
