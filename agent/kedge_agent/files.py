"""File operations that leave a complete file or none, even after a power cut."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from kedge_protocol.errors import StorageError
from kedge_protocol.files import flush


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn OS errors into a :class:`StorageError` that names ``path``."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{error.strerror or error}",
            where=str(error.filename or path),
            remedy="Check the free space and the permissions of the state folder",
        ) from error


def replace_link(path: Path, target: str) -> None:
    """Point the symbolic link ``path`` at ``target`` (relative to its folder) atomically."""
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        staged.unlink()
    staged.symlink_to(target)
    staged.replace(path)
    flush(path.parent)
