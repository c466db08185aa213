"""The samples that a request has chosen so far, as files: what remains of a stream when only the smallest ranks are
kept. A rank is the confidence, or drawn at random, so that each sample is kept with the same probability (J. S. Vitter,
"Random Sampling with a Reservoir", 1985, in its form with random keys).

::

    FOLDER/RANK-DIGEST   one frame; RANK has 16 digits and sorts, DIGEST is of the inputs, so that none is kept twice
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from kedge_protocol import frames

RANKS = 10**15


class Reservoir:
    """Keeps the frames of the smallest ranks.

    Args:
        folder: made if it is missing; what an earlier start of the agent kept is there.
        count, size: how many at most, and their bytes.

    Raises:
        OSError: it cannot be made or read.
    """

    def __init__(self, folder: Path, *, count: int, size: int) -> None:
        self._folder = folder
        self._count = count
        self._limit = size
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._sizes: dict[str, int] = {}
        """Name → bytes."""
        for entry in os.scandir(folder):
            if entry.name.startswith("."):
                (folder / entry.name).unlink()
            else:
                self._sizes[entry.name] = entry.stat().st_size

    def __len__(self) -> int:
        return len(self._sizes)

    @property
    def size(self) -> int:
        """Return the bytes of all frames."""
        return sum(self._sizes.values())

    def offer(self, rank: int, inputs: bytes, head: bytes, body: bytes) -> bool:
        """Keep a sample if it is among the smallest ranks and none of its inputs is there; return whether it is kept.

        Args:
            rank: 0 to :data:`RANKS`.
            inputs: the bytes of its inputs.

        Raises:
            OSError: it cannot be written.
        """
        digest = hashlib.sha256(inputs).hexdigest()[:16]
        if any(name.endswith(digest) for name in self._sizes):
            return False
        name, size = f"{rank:016d}-{digest}", frames.LENGTH.size + len(head) + len(body)
        dropped = self._dropped(name, size)
        if dropped is None:
            return False
        staged = self._folder / f".{digest}"
        with staged.open("wb") as file:
            file.write(frames.LENGTH.pack(len(head), len(body)))
            file.write(head)
            file.write(body)
        staged.rename(self._folder / name)
        self._sizes[name] = size
        for other in dropped:
            del self._sizes[other]
            with contextlib.suppress(FileNotFoundError):
                (self._folder / other).unlink()
        return True

    def _dropped(self, name: str, size: int) -> list[str] | None:
        """Return what must go for a new sample; None where it is the new one itself."""
        count, total, dropped = len(self._sizes) + 1, self.size + size, []
        for other in sorted(self._sizes, reverse=True):
            if count <= self._count and total <= self._limit:
                break
            if other < name:
                return None
            dropped.append(other)
            count, total = count - 1, total - self._sizes[other]
        return dropped if count <= self._count and total <= self._limit else None

    def frames(self) -> Iterator[bytes]:
        """Yield the frames, the smallest rank first."""
        for name in sorted(self._sizes):
            yield (self._folder / name).read_bytes()
