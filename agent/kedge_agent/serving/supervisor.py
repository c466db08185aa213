"""The serving process, started and watched by the agent: a model that crashes its runtime takes this child down, and
nothing else. One that hangs, or is stopped, gives no sign of life and is killed."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

from kedge_agent.serving.status_pipe import StatusReader
from kedge_agent.slots import Serving
from kedge_protocol.mqtt import Backoff
from kedge_targets.worker import bootstrap

log = logging.getLogger(__name__)

STABLE_SECONDS = 30.0
"""A child that lived this long ends the row of deaths."""
PATIENCE = 5.0
"""Seconds that it has to end by itself."""
MAX_START_SECONDS = 60.0
"""It must be there, and give its first sign of life, within this; a slow board takes 10 for its imports."""
_LATE = 5.0
"""Seconds between two looks of ours after which the silence is not the child's fault."""


class ServingSupervisor:
    """One child, restarted with back-off.

    Linux kills it when the *thread* that started it ends, so :meth:`poll` belongs to the main thread.

    Args:
        state: the agent's state folder.
        listen: ``host:port``.
        hang_seconds: without a sign of life before it is killed.
        call_seconds: a call or a load that takes longer has hung; the child then gives no sign of life.
    """

    def __init__(
        self,
        state: Path,
        listen: str,
        *,
        hang_seconds: float = 30.0,
        call_seconds: float = 180.0,
        backoff: Backoff | None = None,
    ) -> None:
        self.deaths = 0
        """In a row."""
        self.last_words = ""
        self.came_up = False
        """Whether the child that runs, or the one that ran last, ever gave a sign of life."""
        self._hang_seconds = hang_seconds
        self._command = [
            sys.executable,
            str(Path(bootstrap.__file__).resolve()),
            "--module",
            "kedge_agent.serving",
            "--state",
            str(state),
            "--listen",
            listen,
            "--call-seconds",
            str(call_seconds),
        ]
        self._backoff = backoff or Backoff(0.5, 30.0)
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: StatusReader | None = None
        self._said: dict[str, Serving] = {}
        self._heard_at = self._polled_at = 0.0
        self._started_at = 0.0
        self._next_start = 0.0

    @property
    def pid(self) -> int | None:
        """Of the running child."""
        return None if self._process is None else self._process.pid

    def said(self, model: str) -> Serving | None:
        """What the child that runs said last of a model."""
        return self._said.get(model)

    def poll(self, now: float) -> bool:
        """Hear it; start it where it does not run and its time has come; kill it where it hangs.

        Returns:
            Whether it was found dead since the last call, or could not be started.
        """
        if now - self._polled_at > _LATE:
            self._heard_at = max(self._heard_at, now - _LATE)
        self._polled_at = now
        if self._process is None:
            return now >= self._next_start and not self._start(now)
        status = self._process.poll()
        if status is not None:
            self._died(now, _words(status))
            return True
        self._hear(now)
        silence = now - self._heard_at
        limit = self._hang_seconds if self.came_up else max(self._hang_seconds, MAX_START_SECONDS)
        if silence > limit:
            self._process.kill()
            self._process.wait()
            self._died(now, f"gave no sign of life for {silence:.0f} s and was killed")
            return True
        if self.deaths and now - self._started_at > STABLE_SECONDS:
            self.deaths = 0
            self._backoff.reset()
        return False

    def stop(self) -> None:
        """End it: politely, then not."""
        process = self._process
        self._forget()
        if process is None:
            return
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _hear(self, now: float) -> None:
        for word in self._reader.listen() if self._reader is not None else ():
            self.came_up = True
            self._heard_at = now
            if word.serving is not None:
                self._said[word.model] = word.serving

    def _died(self, now: float, words: str) -> None:
        self._forget()
        self.deaths += 1
        self.last_words = words
        delay = self._backoff.next()
        self._next_start = now + delay
        log.error("the serving process %s; again in %.1f s", words, delay)

    def _forget(self) -> None:
        self._process = None
        self._said = {}
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _start(self, now: float) -> bool:
        """Whether there is a process now."""
        environment = {**os.environ, bootstrap.PARENT_VARIABLE: str(os.getpid())}
        # Only the agent itself speaks to the service manager.
        for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
            environment.pop(name, None)
        self.came_up = False
        try:
            reading, writing = os.pipe()
        except OSError as error:
            self._died(now, f"cannot be started: {error.strerror}")
            return False
        self._reader = StatusReader(reading)
        command = [*self._command, "--tell", str(writing)]
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment, pass_fds=(writing,))
        except (OSError, RuntimeError) as error:
            self._died(now, f"cannot be started: {error}")
            return False
        finally:
            os.close(writing)
        self._started_at = self._heard_at = now
        return True


def _words(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-status).name}"
    return f"was killed by signal {-status}"
