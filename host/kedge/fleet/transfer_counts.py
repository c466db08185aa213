"""Counts blocks: which were served to which device and how often, and which the device reported as finished.

Kept in memory and written to the database in batches, so that serving a block costs no disk write. What a device said
it has (the union of all bitmaps that it ever sent for a blob) is what ``finished_served_again`` is judged by.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import dataclass

from kedge.fleet.database import Database
from kedge_protocol.messages import BlobKind

MAX_CLEAN = 16_384
"""Number of written entries kept in memory."""

_WRITE = """
INSERT INTO transfer
SELECT :device_id, :digest, :kind, :served, :have, :blocks_served, :finished_served_again, :bytes_served
WHERE EXISTS (SELECT 1 FROM device WHERE id = :device_id AND NOT removed)
ON CONFLICT (device_id, digest, kind) DO UPDATE SET
    served = excluded.served, have = excluded.have, blocks_served = excluded.blocks_served,
    finished_served_again = excluded.finished_served_again, bytes_served = excluded.bytes_served
"""

Key = tuple[int, str, BlobKind]
"""Device's number, blob's digest, kind."""


@dataclass
class TransferCount:
    """The counts of one device and blob. Bitmaps are integers; bit i stands for block i."""

    served: int = 0
    have: int = 0
    blocks_served: int = 0
    finished_served_again: int = 0
    bytes_served: int = 0


class TransferCounts:
    """All counts. :meth:`told` and :meth:`served` are called from different threads, :meth:`flush` from a third."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._entries: dict[Key, TransferCount] = {}
        self._dirty: dict[Key, TransferCount] = {}
        self._loaded: dict[int, None] = {}
        self._lock = threading.Lock()

    def told(self, key: Key, have: int) -> None:
        """Record the blocks that the device reports as finished."""
        with self._lock:
            self._load(key[0])
            entry = self._entries.setdefault(key, TransferCount())
            if have & ~entry.have:
                entry.have |= have
                self._dirty[key] = entry

    def finished(self, key: Key, index: int) -> bool:
        """Whether the device has said by now that it has this block. To be asked before the block is handed over: its
        answer may come before the handing over is noted."""
        with self._lock:
            self._load(key[0])
            entry = self._entries.get(key)
            return entry is not None and bool(entry.have >> index & 1)

    def served(self, key: Key, index: int, size: int, *, again: bool) -> None:
        """One block of ``size`` bytes was handed to the broker; ``again`` if it was :meth:`finished` before."""
        with self._lock:
            self._load(key[0])
            entry = self._entries.setdefault(key, TransferCount())
            entry.blocks_served += 1
            entry.bytes_served += size
            entry.served |= 1 << index
            entry.finished_served_again += again
            self._dirty[key] = entry

    def _load(self, device_id: int) -> None:
        """All that is known of a device, once: a statement for each of its blobs would cost more than the blocks. Under
        the lock, so that nothing is forgotten between the look and the count."""
        if device_id in self._loaded:
            return
        with self._database.read() as session:
            rows = session.rows("SELECT * FROM transfer WHERE device_id = ?", (device_id,))
        self._loaded[device_id] = None
        for row in rows:
            self._entries[device_id, row["digest"], BlobKind(row["kind"])] = TransferCount(
                served=int.from_bytes(row["served"], "little"),
                have=int.from_bytes(row["have"], "little"),
                blocks_served=row["blocks_served"],
                finished_served_again=row["finished_served_again"],
                bytes_served=row["bytes_served"],
            )

    def keep(self, devices: Collection[int]) -> None:
        """Drop devices that are not among these numbers."""
        kept = set(devices)
        with self._lock:
            self._entries = {key: entry for key, entry in self._entries.items() if key[0] in kept}
            self._dirty = {key: entry for key, entry in self._dirty.items() if key[0] in kept}
            self._loaded = {number: None for number in self._loaded if number in kept}

    def flush(self) -> None:
        """Write the changes. After an error they stay marked as changed.

        Raises:
            StorageError: the database does not answer.
        """
        with self._lock:
            changed, self._dirty = self._dirty, {}
            rows = [_row(key, entry) for key, entry in changed.items()]
        if not rows:
            return
        try:
            self._write(rows)
        except BaseException:
            with self._lock:
                self._dirty = {key: self._entries[key] for key in changed if key in self._entries} | self._dirty
            raise
        self._forget_oldest()

    def _write(self, rows: list[dict[str, object]]) -> None:
        # A device that was removed meanwhile takes its counts with it.
        with self._database.write() as session:
            session.run_many(_WRITE, rows)

    def _forget_oldest(self) -> None:
        """Drop whole devices, the longest unserved first, until few enough entries are left."""
        with self._lock:
            excess = len(self._entries) - MAX_CLEAN
            if excess <= 0:
                return
            of: dict[int, list[Key]] = {}
            for key in self._entries:
                of.setdefault(key[0], []).append(key)
            for number in list(self._loaded):
                keys = of.get(number, [])
                if excess <= 0:
                    return
                if not any(key in self._dirty for key in keys):
                    excess -= len(keys)
                    del self._loaded[number]
                    for key in keys:
                        del self._entries[key]


def _row(key: Key, entry: TransferCount) -> dict[str, object]:
    device_id, digest, kind = key
    return {
        "device_id": device_id,
        "digest": digest,
        "kind": kind.value,
        "served": _bitmap(entry.served),
        "have": _bitmap(entry.have),
        "blocks_served": entry.blocks_served,
        "finished_served_again": entry.finished_served_again,
        "bytes_served": entry.bytes_served,
    }


def _bitmap(bits: int) -> bytes:
    return bits.to_bytes((bits.bit_length() + 7) // 8, "little")
