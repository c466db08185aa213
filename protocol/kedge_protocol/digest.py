"""Digests: ``sha256:`` and 64 hexadecimal digits, as in the OCI image specification."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from kedge_protocol.errors import BundleError, DigestMismatchError, StorageError

_PATTERN = re.compile(r"sha256:[0-9a-f]{64}\Z")
_CHUNK = 1 << 20


def of_bytes(data: bytes | bytearray | memoryview) -> str:
    """Return the digest of ``data``."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def of_chunks(chunks: Iterable[bytes | memoryview]) -> str:
    """Return the digest of bytes given in chunks."""
    state = hashlib.sha256()
    for chunk in chunks:
        state.update(chunk)
    return "sha256:" + state.hexdigest()


def of_file(path: Path) -> str:
    """Return the digest of a file, read in chunks.

    Raises:
        StorageError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return of_chunks(iter(lambda: file.read(_CHUNK), b""))
    except OSError as error:
        raise StorageError(f"cannot be read: {error.strerror}", where=str(path)) from error


def checked(digest: str, *, where: str = "digest") -> str:
    """Return ``digest`` if it is well formed: digests become file names, so all are checked.

    Raises:
        BundleError: it is not ``sha256:`` with 64 lower-case hexadecimal digits.
    """
    if not _PATTERN.match(digest):
        raise BundleError(f"{digest[:90]!r} is no sha256 digest", where=where)
    return digest


def hex_of(digest: str) -> str:
    """Check a digest and return its hexadecimal part."""
    return checked(digest).partition(":")[2]


def verify_bytes(data: bytes | bytearray | memoryview, digest: str, *, where: str) -> None:
    """Raise :class:`DigestMismatchError` unless ``data`` has this digest."""
    actual = of_bytes(data)
    if actual != digest:
        raise DigestMismatchError(f"has digest {actual}, not {digest}", where=where)


def verify_file(path: Path, digest: str) -> None:
    """Raise :class:`DigestMismatchError` unless the file has this digest."""
    actual = of_file(path)
    if actual != digest:
        raise DigestMismatchError(f"has digest {actual}, not {digest}", where=str(path))
