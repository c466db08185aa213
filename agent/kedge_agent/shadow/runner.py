"""Starts shadows, reads what they tell, and ends them when they take more memory than they may."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from kedge_agent.slots import ModelFolder
from kedge_agent.update import actions, events
from kedge_protocol import codec, memory
from kedge_protocol.errors import MessageError
from kedge_protocol.messages import ShadowTelemetry
from kedge_protocol.samples import Choice
from kedge_targets.worker import bootstrap

log = logging.getLogger(__name__)

_MAX_LINE = 1 << 16
_TAIL = 400


@dataclass(frozen=True, kw_only=True)
class ShadowLimits:
    """What this device allows a shadow at most, whatever the fleet asks for.

    Attributes:
        share: share of one processor core; 0 allows none.
        memory_bytes: resident memory.
    """

    share: float = 0.25
    memory_bytes: int = 1 << 30


@dataclass
class _Running:
    process: subprocess.Popen[bytes]
    wanted: actions.StartShadow
    log: Path
    buffer: bytes = b""
    messages: list[ShadowTelemetry] = field(default_factory=list)


class ShadowRunner:
    """The shadows' processes.

    Linux ends a process with the *thread* that started it, so :meth:`poll` must be called in the main thread;
    :meth:`apply` may be called in any.

    Args:
        state: the agent's state folder.
        limits: what the device allows.
        post: called with the end of a shadow, from :meth:`poll`.
    """

    def __init__(self, state: Path, limits: ShadowLimits, *, post: Callable[[events.Event], None]) -> None:
        self._state = state
        self._limits = limits
        self._post = post
        self._wanted: dict[str, actions.StartShadow] = {}
        self._running: dict[str, _Running] = {}

    def apply(self, action: actions.StartShadow | actions.StopShadow) -> None:
        """Note which shadow shall run."""
        if isinstance(action, actions.StartShadow):
            self._wanted[action.model] = action
        else:
            self._wanted.pop(action.model, None)

    def poll(self) -> None:
        """Start and end processes, read what they tell, and keep their memory within its limit."""
        wanted = dict(self._wanted)
        for model, running in list(self._running.items()):
            if wanted.get(model) is not running.wanted:
                self._end(model)
        for model, action in wanted.items():
            if model not in self._running:
                self._begin(model, action)
        for model, running in list(self._running.items()):
            self._watch(model, running)

    def take(self, model: str) -> ShadowTelemetry | None:
        """Return what a model's shadow has answered since the last call; None without a running shadow."""
        running = self._running.get(model)
        if running is None:
            return None
        messages, running.messages = running.messages, []
        return merged(running.wanted.digest, messages)

    def close(self) -> None:
        """End all processes."""
        self._wanted.clear()
        for model in list(self._running):
            self._end(model)

    def _begin(self, model: str, action: actions.StartShadow) -> None:
        folder = ModelFolder(self._state, model)
        share = min(action.share, self._limits.share)
        if share <= 0:
            self._give_up(action, "this device allows no shadows ([shadow] share in agent.toml)")
            return
        said = folder.path / "shadow.log"
        command = [sys.executable, str(Path(bootstrap.__file__).resolve()), "--module", "kedge_agent.shadow"]
        command += ["--folder", str(folder.slot(action.digest).folder), "--socket", str(folder.shadow_socket)]
        command += ["--samples", str(folder.sample_socket(Choice.DISAGREE))]
        command += ["--beside", action.beside, "--share", str(share)]
        environment = {**os.environ, bootstrap.PARENT_VARIABLE: str(os.getpid())}
        for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
            environment.pop(name, None)
        try:
            with said.open("wb") as errors:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, env=environment
                )
        except OSError as error:
            self._give_up(action, f"it cannot be started: {error.strerror or error}")
            return
        if process.stdout is not None:
            os.set_blocking(process.stdout.fileno(), False)
        self._running[model] = _Running(process, action, said)
        log.info("%s: %s runs as a shadow", model, action.digest[:19])

    def _watch(self, model: str, running: _Running) -> None:
        self._hear(running)
        status = running.process.poll()
        limit = min(running.wanted.memory_bytes, self._limits.memory_bytes)
        if status is not None:
            reason = f"it ended with status {status}: {_tail(running.log)}"
        elif (memory.resident(running.process.pid) or 0) > limit:
            reason = f"it took more than {limit >> 20} MiB of memory and was ended"
        else:
            return
        self._end(model)
        self._give_up(running.wanted, reason)

    def _hear(self, running: _Running) -> None:
        output = running.process.stdout
        with contextlib.suppress(BlockingIOError):
            running.buffer += (output.read(_MAX_LINE) or b"") if output is not None else b""
        while b"\n" in running.buffer:
            line, _, running.buffer = running.buffer.partition(b"\n")
            with contextlib.suppress(MessageError):
                running.messages.append(codec.decode(line, ShadowTelemetry, where="shadow"))
        running.messages = [merged(running.wanted.digest, running.messages)] if running.messages else []
        running.buffer = running.buffer[-_MAX_LINE:]

    def _give_up(self, action: actions.StartShadow, reason: str) -> None:
        log.warning("%s: the shadow %s: %s", action.model, action.digest[:19], reason)
        if self._wanted.get(action.model) is action:
            del self._wanted[action.model]
        self._post(events.ShadowEnded(action.model, action.digest, reason))

    def _end(self, model: str) -> None:
        running = self._running.pop(model)
        running.process.kill()
        running.process.wait()
        if running.process.stdout is not None:
            running.process.stdout.close()
        with contextlib.suppress(OSError):
            ModelFolder(self._state, model).shadow_socket.unlink()


def merged(digest: str, messages: list[ShadowTelemetry]) -> ShadowTelemetry:
    """Add what a shadow told."""
    classes: dict[str, tuple[int, ...]] = {}
    old: dict[str, int] = {}
    new: dict[str, int] = {}
    for message in messages:
        for name, counts in message.classes.items():
            known = classes.get(name, (0,) * len(counts))
            classes[name] = tuple(a + b for a, b in zip(known, counts, strict=False))
        for total, part in ((old, message.old_buckets), (new, message.new_buckets)):
            for bucket, count in part.items():
                total[bucket] = total.get(bucket, 0) + count
    return ShadowTelemetry(
        digest=digest,
        compared=sum(message.compared for message in messages),
        agreed=sum(message.agreed for message in messages),
        classes=dict(list(classes.items())[:65]),
        confidence_shift=sum(message.confidence_shift for message in messages),
        old_buckets=old,
        new_buckets=new,
        errors=sum(message.errors for message in messages),
    )


def _tail(path: Path) -> str:
    with contextlib.suppress(OSError):
        lines = path.read_bytes()[-_TAIL:].decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "without a word"
    return "without a word"
