"""One controller a state folder: a lock file that the system frees with the process, however that ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from kedge_protocol.errors import FleetError, StorageError


@contextlib.contextmanager
def only_controller(folder: Path) -> Iterator[None]:
    """Be the folder's controller, or keep others from being it.

    Raises:
        FleetError: another controller runs on this folder.
        StorageError: it cannot be written.
    """
    path = folder / "controller.lock"
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise StorageError(f"cannot be written: {error.strerror}", where=str(path)) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise FleetError(
            "another controller runs on this state folder",
            where=str(folder),
            remedy="Stop it first, or give this one its own --state",
        ) from error
    try:
        yield
    finally:
        os.close(handle)
