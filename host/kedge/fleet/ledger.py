"""The count of blocks: which were served to which device how often, and which it said it had.

Kept in memory and written to the database in batches, so that serving a block costs no disk write. What a device said
it has (the union of all bitmaps that it ever sent for a blob) is what ``finished_served_again`` is judged by.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.dialects.sqlite import insert

from kedge.fleet import tables
from kedge.fleet.database import Database
from kedge_protocol.messages import BlobKind

MAX_CLEAN = 4096
"""Entries kept in memory that are written already."""

Key = tuple[int, str, BlobKind]
"""Device's number, blob's digest, kind."""


@dataclass
class Entry:
    """The counts of one device and blob; bitmaps are integers, bit i for block i."""

    served: int = 0
    have: int = 0
    blocks_served: int = 0
    finished_served_again: int = 0
    bytes_served: int = 0
    dirty: bool = False


class Ledger:
    """All entries. :meth:`told` and :meth:`served` are called from different threads, :meth:`flush` from a third."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._entries: dict[Key, Entry] = {}
        self._lock = threading.Lock()

    def told(self, key: Key, have: int) -> None:
        """The device said that it has these blocks."""
        loaded = self._entry(key)
        with self._lock:
            entry = self._entries.setdefault(key, loaded)
            if have & ~entry.have:
                entry.have |= have
                entry.dirty = True

    def finished(self, key: Key, index: int) -> bool:
        """Whether the device has said by now that it has this block. To be asked before the block is handed over: its
        answer may come before the handing over is noted."""
        loaded = self._entry(key)
        with self._lock:
            return bool(self._entries.setdefault(key, loaded).have >> index & 1)

    def served(self, key: Key, index: int, size: int, *, again: bool) -> None:
        """One block of ``size`` bytes was handed to the broker; ``again`` if it was :meth:`finished` before."""
        loaded = self._entry(key)
        with self._lock:
            entry = self._entries.setdefault(key, loaded)
            entry.blocks_served += 1
            entry.bytes_served += size
            entry.served |= 1 << index
            entry.finished_served_again += again
            entry.dirty = True

    def _entry(self, key: Key) -> Entry:
        with self._lock:
            entry = self._entries.get(key)
        if entry is not None:
            return entry
        return self._load(key)

    def _load(self, key: Key) -> Entry:
        device_id, digest, kind = key
        with self._database.read() as session:
            row = session.get(tables.Transfer, (device_id, digest, kind.value))
            if row is None:
                return Entry()
            return Entry(
                served=int.from_bytes(row.served, "little"),
                have=int.from_bytes(row.have, "little"),
                blocks_served=row.blocks_served,
                finished_served_again=row.finished_served_again,
                bytes_served=row.bytes_served,
            )

    def keep(self, devices: Collection[int]) -> None:
        """Forget devices that are not among these numbers."""
        with self._lock:
            self._entries = {key: entry for key, entry in self._entries.items() if key[0] in devices}

    def flush(self) -> None:
        """Write what changed. On an error it stays marked as changed.

        Raises:
            StorageError: the database does not answer.
        """
        with self._lock:
            changed = {key: entry for key, entry in self._entries.items() if entry.dirty}
            rows = [_row(key, entry) for key, entry in changed.items()]
            for entry in changed.values():
                entry.dirty = False
        if not rows:
            return
        try:
            self._write(rows)
        except BaseException:
            with self._lock:
                for entry in changed.values():
                    entry.dirty = True
            raise
        self._forget_oldest()

    def _write(self, rows: list[dict[str, object]]) -> None:
        statement = insert(tables.Transfer)
        keys = ("device_id", "digest", "kind")
        statement = statement.on_conflict_do_update(
            index_elements=keys, set_={name: statement.excluded[name] for name in rows[0] if name not in keys}
        )
        with self._database.write() as session:
            # A device that was removed meanwhile takes its counts with it.
            there = set(session.scalars(select(tables.Device.id).where(tables.Device.removed.is_(False))))
            kept = [row for row in rows if row["device_id"] in there]
            if kept:
                session.execute(statement, kept)

    def _forget_oldest(self) -> None:
        with self._lock:
            excess = len(self._entries) - MAX_CLEAN
            for key in [key for key, entry in self._entries.items() if not entry.dirty][: max(0, excess)]:
                del self._entries[key]


def _row(key: Key, entry: Entry) -> dict[str, object]:
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
