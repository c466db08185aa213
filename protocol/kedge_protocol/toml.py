"""Reads TOML 1.0, with the standard library if Python has it (3.11)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from kedge_protocol.errors import KedgeError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

loads = tomllib.loads
TOMLDecodeError = tomllib.TOMLDecodeError


def read(path: Path, failure: type[KedgeError], *, where: str | None = None, remedy: str | None = None) -> Any:
    """Read a file's tables.

    Args:
        failure: the error class for this kind of file.
        where: the place named in the error; None for the path.

    Raises:
        failure: the file is missing, not readable or not TOML.
    """
    where = str(path) if where is None else where
    try:
        return loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise failure(f"cannot be read: {error.strerror}", where=where, remedy=remedy) from error
    except (ValueError, RecursionError) as error:
        raise failure(f"is not TOML: {error}", where=where, remedy=remedy) from error
