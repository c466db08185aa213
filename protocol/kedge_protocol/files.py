"""Atomic file writes that survive a power cut, and locks between processes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO


def flush(path: Path) -> None:
    """Sync a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def replacement(path: Path, *, mode: int = 0o644) -> Iterator[Path]:
    """Yield an empty file beside ``path`` that replaces it, synced, if the block succeeds; otherwise it is removed.

    Args:
        path: its folder must exist.
        mode: the permissions of the file, whatever the umask is.

    Raises:
        OSError: the disk is full or not writable; ``path`` is unchanged.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(mode)
        flush(temporary)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    flush(path.parent)


@contextlib.contextmanager
def new_file(path: Path, *, mode: int = 0o644) -> Iterator[BinaryIO]:
    """Yield a :func:`replacement` opened for writing."""
    with replacement(path, mode=mode) as temporary, temporary.open("wb") as file:
        yield file


def write(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write a file atomically: a reader sees the old bytes or the new ones. Errors are as in :func:`replacement`."""
    with new_file(path, mode=mode) as file:
        file.write(data)


def write_once(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write a file that must not exist yet: if several processes try, the first one wins.

    Raises:
        FileExistsError: the file exists.
        OSError: the disk is full or not writable.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        path.hardlink_to(name)
    finally:
        Path(name).unlink()
    flush(path.parent)


def try_lock(handle: int, *, shared: bool = False) -> bool:
    """Lock an open file for this process unless another process holds the lock. The lock ends with the descriptor."""
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock(handle: int) -> None:
    """Lock an open file for this process; wait if another process holds the lock."""
    fcntl.flock(handle, fcntl.LOCK_EX)


def unlock(handle: int) -> None:
    """Release the lock before the descriptor is closed."""
    fcntl.flock(handle, fcntl.LOCK_UN)


def open_lock(path: Path, *, mode: int = 0o644) -> int:
    """Open a lock file, creating it if missing, without following links.

    Raises:
        OSError: the file cannot be created.
    """
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, mode)


@contextlib.contextmanager
def locked(path: Path, *, mode: int = 0o644, on_wait: Callable[[], None] = lambda: None) -> Iterator[int]:
    """Hold the lock of a file: one process at a time, others wait. The system releases it with the process.

    Args:
        on_wait: called once if another process holds the lock.

    Yields:
        The lock's descriptor: a process that inherits it holds the lock too.

    Raises:
        OSError: the file cannot be created.
    """
    handle = open_lock(path, mode=mode)
    try:
        if not try_lock(handle):
            on_wait()
            lock(handle)
        yield handle
    finally:
        os.close(handle)
