"""Allows one controller per state folder by a lock file that the system releases with the process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from kedge_protocol import files
from kedge_protocol.errors import FleetError, StorageError


@contextlib.contextmanager
def only_controller(folder: Path) -> Iterator[None]:
    """Take the role of the folder's controller, or keep others from taking it.

    Raises:
        FleetError: another controller runs on this folder.
        StorageError: it cannot be written.
    """
    path = folder / "controller.lock"
    try:
        handle = files.open_lock(path)
    except OSError as error:
        raise StorageError(f"cannot be written: {error.strerror}", where=str(path)) from error
    if not files.try_lock(handle):
        os.close(handle)
        raise FleetError(
            "another controller runs on this state folder",
            where=str(folder),
            remedy="Stop it first, or give this one its own --state",
        )
    try:
        yield
    finally:
        os.close(handle)
