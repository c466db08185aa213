"""Files that hold a credential: a password, a key, a certificate."""

from __future__ import annotations

from pathlib import Path

from kedge_protocol.errors import ConfigError

LARGEST_BYTES = 1 << 20


def read(path: Path, what: str = "the file") -> bytes:
    """Read a credential; ``what`` names it in errors.

    Raises:
        ConfigError: the file cannot be read, or is too large for a credential.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{what} cannot be read: {error.strerror}", where=str(path)) from error
    if len(content) > LARGEST_BYTES:
        raise ConfigError(f"{what} is no credential: more than {LARGEST_BYTES} bytes", where=str(path))
    return content


def read_password(path: Path) -> str:
    """Read the first line of a password file.

    Raises:
        ConfigError: as in :func:`read`; or the line is empty or not UTF-8.
    """
    try:
        lines = read(path, "the password file").decode().splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError("the password is not UTF-8", where=str(path)) from error
    if not lines or not lines[0]:
        raise ConfigError("the first line is empty, a password was expected", where=str(path))
    return lines[0]
