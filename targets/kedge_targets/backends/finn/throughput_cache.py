"""Keeps the results of FINN's throughput test for a bitfile on this device."""

from __future__ import annotations

from pathlib import Path

from kedge_protocol import codec, digest, files
from kedge_protocol.errors import KedgeError, StorageError


class Kept:
    """The figures of one bitfile.

    Args:
        cache: folder in which backends keep data on this device.
        bitfile: the measured bitfile, identified by its bytes.
    """

    def __init__(self, cache: Path, bitfile: Path) -> None:
        self._path = cache / "finn" / f"throughput-{digest.hex_of(digest.of_file(bitfile))[:32]}.json"

    def read(self) -> dict[str, float] | None:
        """Return what was kept, or None if there is nothing readable."""
        try:
            found = codec.loads(self._path.read_bytes(), where=self._path.name)
        except (OSError, KedgeError):
            return None
        whole = isinstance(found, dict) and all(isinstance(value, (int, float)) for value in found.values())
        return found if whole and "samples_per_second" in found else None

    def write(self, figures: dict[str, float]) -> None:
        """Store the figures.

        Raises:
            StorageError: the disk is full or not writable.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            files.write(self._path, codec.encode(figures), mode=0o600)
        except OSError as error:
            raise StorageError(f"cannot be written: {error.strerror}", where=str(self._path.parent)) from error
