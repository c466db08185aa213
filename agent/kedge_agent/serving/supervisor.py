"""Starts and watches the serving process: a model that crashes its runtime takes down that process and nothing else.

The sockets belong to the agent, so that clients wait in the kernel's queue, instead of being refused, while the process
is restarted. A process that hangs or is stopped no longer counts in the shared page, and is killed. A model that was
being called each of several times that the process died is left out from then on, so that the others go on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from kedge_agent.room import DECLARED
from kedge_agent.serving.heartbeat import EXIT_HUNG, HeartbeatReader, new_page
from kedge_agent.serving.settings import ServerSettings, listening_socket
from kedge_agent.serving.status_pipe import StatusReader
from kedge_agent.slots import Serving
from kedge_protocol import codec, memory
from kedge_protocol.errors import ConfigError
from kedge_protocol.mqtt import Backoff
from kedge_targets.worker import bootstrap

log = logging.getLogger(__name__)

STABLE_SECONDS = 30.0
"""A process that has lived this long resets the count of deaths."""
PATIENCE = 5.0
"""Seconds that the process gets to end by itself."""
MAX_START_SECONDS = 60.0
"""Seconds within which the process must give its first sign of life; a slow board takes 10 for its imports."""
CRASHES_OF_ONE_MODEL, CRASH_WINDOW = 3, 600.0
"""After this many deaths within this many seconds during its calls, a bundle is left out."""
_LATE = 5.0
"""If more seconds than this pass between two polls, the process is not blamed for its silence."""
_AT_ONCE = 2
"""Number of consecutive deaths up to which the process is restarted without waiting, if it had come up."""
_LIVED_SECONDS = 1.0
"""A process that lived this long before it was killed from outside is restarted without waiting, however often."""
_OVER_SECONDS = 1.0
"""Time for which it must have too much: what a model declares is heard a moment after the model was loaded."""
_MEMORY_SHARE = 0.5
"""Share of the device's memory beyond which a serving process counts as leaking."""


class ServingSupervisor:
    """Supervises one serving process and restarts it with back-off.

    Linux kills the process when the *thread* that started it ends, so :meth:`poll` must be called in the main thread.

    Args:
        state: the agent's state folder.
        listen: addresses, ``host:port`` or ``unix:PATH``.
        settings: settings of the HTTP server.
        silence_seconds: time without a sign of life after which the process is killed; while it loads models, at least
            ``settings.load_seconds``.
        memory_bytes: resident memory, beside that of language models, above which the process is restarted; 0 for half
            of the device's memory.
    """

    def __init__(
        self,
        state: Path,
        listen: Sequence[str],
        settings: ServerSettings = ServerSettings(),  # noqa: B008 -- frozen
        *,
        silence_seconds: float = 10.0,
        memory_bytes: int = 0,
        backoff: Backoff | None = None,
    ) -> None:
        self.deaths = 0
        """Number of consecutive deaths."""
        self.last_words = ""
        self.died_serving = False
        """Whether the process that died last had given a sign of life."""
        self.left_out: dict[str, str] = {}
        """Digest → model name of the bundles that are left out because they took the process down repeatedly."""
        self._state = state
        self._listen = list(listen)
        self._settings = settings
        self._silence_seconds = silence_seconds
        self._memory_bytes = memory_bytes or int(_MEMORY_SHARE * memory.physical())
        self._backoff = backoff or Backoff(0.5, 30.0)
        self._sockets: list[socket.socket] = []
        self._grpc: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: StatusReader | None = None
        self._heartbeat: HeartbeatReader | None = None
        self._said: dict[str, Serving] = {}
        self._beats = 0
        self._heard_at = self._polled_at = 0.0
        self._started_at = 0.0
        self._next_start = 0.0
        self._came_up = False
        self._killed_for = ""
        self._kill_at = 0.0
        self._over_since = 0.0
        self._blamed: dict[str, deque[float]] = {}

    @property
    def pid(self) -> int | None:
        """Return the running process's id, or None if there is none."""
        return None if self._process is None else self._process.pid

    def said(self, model: str) -> Serving | None:
        """Return the running process's last report about a model."""
        return self._said.get(model)

    def listen(self) -> list[socket.socket]:
        """Return the listening sockets for HTTP; connections, also those for gRPC, wait until the process accepts them.

        Raises:
            ConfigError: the process cannot listen on an address.
        """
        while len(self._sockets) < len(self._listen):
            self._sockets.append(listening_socket(self._listen[len(self._sockets)]))
        if self._settings.grpc_listen is not None and self._grpc is None:
            self._grpc = listening_socket(self._settings.grpc_listen)
        return self._sockets

    def poll(self, now: float) -> bool:
        """Read the process's messages; start it if it does not run and is due; kill it if it hangs.

        Returns:
            Whether it has died since the last call, or could not be started.
        """
        if now - self._polled_at > _LATE:
            self._heard_at = max(self._heard_at, now - _LATE)
        self._polled_at = now
        if self._process is None:
            return now >= self._next_start and not self._start(now)
        status = self._process.poll()
        if status is not None:
            self._hear(now)
            # Nobody kills or terminates itself: that came from outside, and no bundle is to blame.
            outside = status in (-signal.SIGKILL, -signal.SIGTERM) and not self._killed_for
            self._died(now, self._killed_for or _words(status), outside=outside)
            return True
        self._hear(now)
        silence = now - self._heard_at
        if silence > self._patience():
            stopped = _is_stopped(self._process.pid)
            self._process.kill()
            self._process.wait()
            words = f"gave no sign of life for {silence:.0f} s and was killed"
            self._died(now, f"was stopped from outside, {words}" if stopped else words, outside=stopped)
            return True
        self._watch_memory(now)
        if self.deaths and now - self._started_at > STABLE_SECONDS:
            self.deaths = 0
            self._backoff.reset()
        return False

    def stop(self) -> None:
        """Terminate the process, kill it if it does not end in time, and close the sockets."""
        process = self._process
        self._forget()
        for one in self._sockets:
            one.close()
        self._sockets.clear()
        if self._grpc is not None:
            self._grpc.close()
            self._grpc = None
        for address in self._listen:
            if address.startswith("unix:"):
                with contextlib.suppress(OSError):
                    Path(address.removeprefix("unix:")).unlink()
        if process is None:
            return
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _patience(self) -> float:
        """Return the seconds that the process may be silent now."""
        if not self._came_up:
            return max(self._silence_seconds, MAX_START_SECONDS)
        # Its loop turns once the models that were there at the start are loaded.
        loads = self._beats == 0 or (self._heartbeat is not None and self._heartbeat.loading)
        return max(self._silence_seconds, self._settings.load_seconds) if loads else self._silence_seconds

    def _hear(self, now: float) -> None:
        for message in self._reader.listen() if self._reader is not None else ():
            self._came_up = True
            if message.serving is not None:
                self._said[message.model] = message.serving
        beats = 0 if self._heartbeat is None else self._heartbeat.beats
        if beats != self._beats:
            self._beats = beats
            self._heard_at = now

    def _watch_memory(self, now: float) -> None:
        process = self._process
        if process is not None and self._killed_for and now > self._kill_at:
            process.kill()
        if process is None or self._killed_for:
            return
        # A language model may be most of a device; what it takes is known, and was admitted.
        allowed = self._memory_bytes + sum(int(one.figures.get(DECLARED, 0)) for one in self._said.values())
        loading = self._heartbeat is not None and self._heartbeat.loading
        if loading or (memory.resident(process.pid) or 0) <= allowed:
            self._over_since = now
        elif now - self._over_since > _OVER_SECONDS:
            self._killed_for = f"took more than {allowed >> 20} MiB of memory and was ended"
            # It answers what it has accepted; what comes meanwhile waits for the next one.
            process.terminate()
            self._kill_at = now + self._settings.drain_seconds + PATIENCE

    def _died(self, now: float, words: str, *, outside: bool = False) -> None:
        """Forget the process that has died and plan the next one's start.

        Args:
            outside: whether it was killed or stopped by somebody else.
        """
        calls = set() if self._heartbeat is None else self._heartbeat.running()
        if calls:
            words += f", during calls of {', '.join(sorted(calls))}"
        if not outside:
            self._blame(calls, now)
        self._forget()
        self.died_serving = self._came_up
        self.deaths += 1
        self.last_words = words
        harmless = outside and now - self._started_at > _LIVED_SECONDS
        at_once = self._came_up and (harmless or self.deaths <= _AT_ONCE)
        delay = 0.0 if at_once else self._backoff.next()
        self._next_start = now + delay
        log.error("the serving process %s; again in %.1f s", words, delay)
        if delay == 0.0:
            self._start(now)

    def _blame(self, calls: set[str], now: float) -> None:
        """Record whose calls were running; leave a bundle out if it, and no other, was among them each time."""
        for name in calls:
            serving = self._said.get(name)
            if serving is not None:
                self._blamed.setdefault(serving.digest, deque(maxlen=CRASHES_OF_ONE_MODEL)).append(now)
        counts = {
            digest: sum(now - at < CRASH_WINDOW for at in times)
            for digest, times in self._blamed.items()
            if digest not in self.left_out
        }
        most = [digest for digest, count in counts.items() if count == max(counts.values())]
        if len(most) == 1 and counts[most[0]] == CRASHES_OF_ONE_MODEL:
            name = next((name for name, serving in self._said.items() if serving.digest == most[0]), "a bundle")
            self.left_out[most[0]] = name
            log.error("%s %s is left out: the process died in its calls again and again", name, most[0])

    def _forget(self) -> None:
        self._process = None
        self._said = {}
        self._heartbeat = None
        self._killed_for = ""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _start(self, now: float) -> bool:
        """Start the process; return whether it runs."""
        self._came_up = False
        try:
            sockets = self.listen()
            self._process = self._spawn(sockets)
        except (OSError, RuntimeError, ConfigError) as error:
            self._died(now, f"cannot be started: {error}")
            return False
        self._started_at = self._heard_at = self._over_since = now
        self._beats = 0
        return True

    def _spawn(self, sockets: Sequence[socket.socket]) -> subprocess.Popen[bytes]:
        environment = {**os.environ, bootstrap.PARENT_VARIABLE: str(os.getpid())}
        # Only the agent itself speaks to the service manager.
        for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
            environment.pop(name, None)
        reading, writing = os.pipe()
        self._reader = StatusReader(reading)
        page = -1
        try:
            page = new_page()
            self._heartbeat = HeartbeatReader(page)
            command = [sys.executable, str(Path(bootstrap.__file__).resolve()), "--module", "kedge_agent.serving"]
            command += ["--state", str(self._state), "--settings", codec.encode(self._settings).decode()]
            command += ["--status-fd", str(writing), "--page-fd", str(page)]
            for one in sockets:
                command += ["--listen-fd", str(one.fileno())]
            if self._grpc is not None:
                command += ["--grpc-fd", str(self._grpc.fileno())]
            for digest in self.left_out:
                command += ["--exclude", digest]
            passed = (writing, page, *(one.fileno() for one in (*sockets, *([self._grpc] if self._grpc else ()))))
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment, pass_fds=passed)
        finally:
            os.close(writing)
            if page >= 0:
                os.close(page)


def _is_stopped(pid: int) -> bool:
    """Return whether a signal has stopped a process (SIGSTOP, a debugger)."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    return False


def _words(status: int) -> str:
    if status == EXIT_HUNG:
        return "ended itself because a runtime hangs"
    if status >= 0:
        return f"ended with status {status}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-status).name}"
    return f"was killed by signal {-status}"
