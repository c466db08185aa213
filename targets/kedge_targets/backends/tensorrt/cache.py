"""Keeps what this device built between starts: engines, build failures, and which kernel set was faster.

A TensorRT engine holds code, so a file placed there by someone else must never be deserialized. Every file carries a
keyed digest (HMAC-SHA256 of its name and all its bytes) under a key that only this user of this device has; a file that
does not verify is removed and counts as absent.

One file::

    32 bytes    the keyed digest
    4 bytes     length of the head, little-endian
    head        JSON: what is known about the payload
    payload     the engine; may be empty
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import os
import secrets
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from kedge_protocol import files
from kedge_protocol.errors import StorageError, WorkerTimeoutError

log = logging.getLogger("kedge.tensorrt")

LIMIT_BYTES = 2 << 30
"""Largest total size of all files; those unused for the longest time are removed first."""
_KEY_FILE = "key"
_DIGEST_BYTES = 32
_SUFFIX = ".kept"


@dataclass(frozen=True)
class Kept:
    """The content of one file."""

    head: dict[str, Any]
    payload: bytes


def name_of(kind: str, of: Mapping[str, Any]) -> str:
    """Return the name under which something that depends on all of this is kept."""
    text = json.dumps(of, sort_keys=True, separators=(",", ":"))
    return f"{kind}-{sha256(text.encode()).hexdigest()[:32]}"


class Cache:
    """A folder of cached files.

    Args:
        folder: created if missing; only this user may enter it.

    Raises:
        StorageError: the folder cannot be created or read, or belongs to someone else.
    """

    def __init__(self, folder: Path, *, limit_bytes: int = LIMIT_BYTES) -> None:
        self.folder = folder
        self._limit = limit_bytes
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = folder.stat()
            if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o022:
                raise StorageError(
                    "others may write to it, so nothing in it can be trusted",
                    where=str(folder),
                    remedy="Remove it, or name another folder in KEDGE_CACHE",
                )
            self._key = self._read_key()
        except OSError as error:
            raise _storage(error, folder) from error

    def load(self, name: str) -> Kept | None:
        """Return what is kept under a name, or None if there is nothing, or nothing that can be trusted."""
        path = self._path(name)
        try:
            raw = path.read_bytes()
            os.utime(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _storage(error, path) from error
        told, rest = raw[:_DIGEST_BYTES], memoryview(raw)[_DIGEST_BYTES:]
        if not hmac.compare_digest(told, self._digest(name, rest)):
            log.warning("%s is damaged or was not made here; it is removed and made anew", path)
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        length = int.from_bytes(rest[:4], "little")
        return Kept(json.loads(bytes(rest[4 : 4 + length])), bytes(rest[4 + length :]))

    def store(self, name: str, head: Mapping[str, Any], payload: bytes = b"") -> None:
        """Store something atomically.

        Raises:
            StorageError: the disk is full or not writable.
        """
        encoded = json.dumps(head).encode()
        rest = len(encoded).to_bytes(4, "little") + encoded + payload
        try:
            files.write(self._path(name), self._digest(name, memoryview(rest)) + rest, mode=0o600)
        except OSError as error:
            raise _storage(error, self.folder) from error
        self._shrink(self._path(name))

    def forget(self, name: str) -> None:
        """Delete what is kept under a name."""
        with contextlib.suppress(OSError):
            self._path(name).unlink()

    @contextlib.contextmanager
    def alone(self, name: str, *, seconds: float) -> Iterator[None]:
        """Prevent other processes of this device from making the same thing at the same time.

        Raises:
            WorkerTimeoutError: another process has held it for longer than ``seconds``.
        """
        try:
            handle = files.open_lock(self.folder / f"{name}.lock", mode=0o600)
        except OSError as error:
            raise _storage(error, self.folder) from error
        try:
            until = time.monotonic() + seconds
            while not files.try_lock(handle):
                if time.monotonic() > until:
                    raise WorkerTimeoutError(
                        f"another process has been building this engine for {seconds:g} s", where=name
                    )
                time.sleep(0.1)
            yield
        finally:
            os.close(handle)

    def _path(self, name: str) -> Path:
        return self.folder / (name + _SUFFIX)

    def _digest(self, name: str, rest: memoryview) -> bytes:
        # The name too: one engine must not pass for another.
        made = hmac.new(self._key, name.encode() + b"\0", sha256)
        made.update(rest)
        return made.digest()

    def _read_key(self) -> bytes:
        path = self.folder / _KEY_FILE
        for _ in range(2):
            with contextlib.suppress(FileNotFoundError):
                key = path.read_bytes()
                if len(key) == _DIGEST_BYTES:
                    return key
                path.unlink()
            with contextlib.suppress(FileExistsError):
                files.write_once(path, secrets.token_bytes(_DIGEST_BYTES), mode=0o600)
        return path.read_bytes()

    def _shrink(self, spare: Path) -> None:
        found = []
        with contextlib.suppress(OSError):
            for path in self.folder.glob(f"*{_SUFFIX}"):
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self._limit:
                return
            if path != spare:
                with contextlib.suppress(OSError):
                    path.unlink()
                    total -= size


def _storage(error: OSError, where: Path) -> StorageError:
    return StorageError(
        f"the cache of engines cannot be used: {error.strerror or error}",
        where=str(where),
        remedy="Free space there, or name another folder in KEDGE_CACHE",
    )
