"""``STATE/agent.json``: what the agent must not forget over a restart; and the lock that keeps it single."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

from kedge_agent.files import storage_errors, write_whole
from kedge_agent.update.actions import Memory, Refusal
from kedge_protocol import codec
from kedge_protocol.errors import MessageError, StorageError

__all__ = ["AgentFile", "Refusal", "lock", "read", "write"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AgentFile:
    """Content of ``agent.json``.

    Attributes:
        boots: starts of the agent so far.
        memory: of the update machine.
    """

    boots: int = 0
    memory: Memory = field(default_factory=Memory)


def read(state: Path) -> AgentFile:
    """The file, or an empty one where it is missing or damaged: the broker has the desired state too.

    Raises:
        StorageError: it is there and cannot be read.
    """
    path = state / "agent.json"
    with storage_errors(path):
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            return AgentFile()
    try:
        return codec.decode(raw, AgentFile, where=str(path))
    except MessageError as error:
        log.warning("%s; starting without it", error)
        return AgentFile()


def write(state: Path, content: AgentFile) -> None:
    """Replace the file.

    Raises:
        StorageError: disk full or not writable.
    """
    path = state / "agent.json"
    with storage_errors(path):
        write_whole(path, codec.encode(content), mode=0o600)


def lock(state: Path) -> int:
    """Take the state folder for this process, until it ends in whatever way.

    Returns:
        The lock's file descriptor.

    Raises:
        StorageError: another agent has it, or the folder cannot be made.
    """
    path = state / "agent.lock"
    with storage_errors(path):
        state.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            other = os.read(handle, 32).decode(errors="replace").strip()
            os.close(handle)
            raise StorageError(
                f"another agent{f' (process {other})' if other else ''} is running with this state folder",
                where=str(state),
                remedy="Stop it first, or give this one its own [state] path",
            ) from error
        with contextlib.suppress(OSError):  # a full disk; the number is for people only
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
    return handle
