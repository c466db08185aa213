"""``STATE/agent.json``: the state that survives a restart, and the lock that allows one agent per folder."""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

from kedge_agent.files import storage_errors
from kedge_agent.update.actions import PersistentState, Refusal
from kedge_protocol import codec, files
from kedge_protocol.errors import MessageError, StorageError

__all__ = ["AgentFile", "Refusal", "lock", "read", "write"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AgentFile:
    """Content of ``agent.json``.

    Attributes:
        boots: number of starts of the agent.
        boot_ids: boot ids of the latest starts.
        memory: persistent state of the update machine.
    """

    boots: int = 0
    boot_ids: list[str] = field(default_factory=list)
    memory: PersistentState = field(default_factory=PersistentState)


def read(state: Path) -> AgentFile:
    """Read the file, or an empty one if it is missing, damaged or unreadable: the broker has the desired state too."""
    path = state / "agent.json"
    try:
        return codec.decode(path.read_bytes(), AgentFile, where=str(path))
    except FileNotFoundError:
        return AgentFile()
    except (OSError, MessageError) as error:
        log.warning("%s; starting without it", error)
        return AgentFile()


def write(state: Path, content: AgentFile) -> None:
    """Replace the file.

    Raises:
        StorageError: the disk is full or not writable.
    """
    path = state / "agent.json"
    with storage_errors(path):
        files.write(path, codec.encode(content), mode=0o600)


def lock(state: Path) -> int | None:
    """Lock the state folder for the lifetime of this process.

    Returns:
        The lock's file descriptor; None if there is no lock file and none can be created.

    Raises:
        StorageError: another agent uses the folder, or there is no folder with models and none can be created.
    """
    path = state / "agent.lock"
    with storage_errors(path):
        handle = _lock_file(path)
        if handle is None:
            return None
        if not files.try_lock(handle):
            other = os.read(handle, 32).decode(errors="replace").strip()
            os.close(handle)
            raise StorageError(
                f"another agent{f' (process {other})' if other else ''} is running with this state folder",
                where=str(state),
                remedy="Stop it first, or give this one its own [state] path",
            )
        with contextlib.suppress(OSError):  # a full disk; the number is for people only
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
    return handle


def _lock_file(path: Path) -> int | None:
    """Open the lock file. A full or read-only disk does not stop the agent if models are installed: they still serve,
    and ``flock`` needs no write permission."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if not (path.parent / "models").is_dir():
            raise
        log.error("%s cannot be written: %s; what is installed is served all the same", path.parent, error.strerror)
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
