"""Backups of the state database: saved while the controller runs, restored while it is stopped."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kedge.fleet import schema
from kedge.fleet.controller_lock import only_controller
from kedge.fleet.database import Database, Session, alone, note_change, state_folder
from kedge.fleet.storage import Repository
from kedge_protocol import files
from kedge_protocol.errors import FleetError, StorageError

_NAME = "fleet.db"
_BEFORE = "fleet.db.before"


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A backup that was written."""

    file: Path
    bytes: int
    devices: int


@dataclass(frozen=True, kw_only=True)
class Restored:
    """A restored backup; ``incomplete`` names releases whose blobs are not all in the state folder."""

    file: Path
    devices: int
    incomplete: tuple[str, ...]


def save(file: Path, state: Path | None = None) -> Saved:
    """Write a consistent copy of the state database to one file. Others may read and write meanwhile.

    A copy of ``fleet.db`` alone would lack what still lies in its write-ahead log.

    Args:
        file: made, or replaced when the backup is whole.
        state: the state folder; None for :func:`kedge.fleet.database.state_folder`'s choice.

    Raises:
        FleetError: there is no database.
        StorageError: the file cannot be written.
    """
    source = state_folder(state) / _NAME
    if not source.is_file():
        raise FleetError("there is no state database", where=str(source), remedy="Give --state, the folder that has it")
    Database(source.parent).close()  # of this version, or an error that says so
    with _beside(file) as temporary:
        devices = _copy(source, temporary)
    return Saved(file=file, bytes=file.stat().st_size, devices=devices)


def restore(file: Path, state: Path | None = None, *, force: bool = False) -> Restored:
    """Replace the state database by a backup. Devices follow later rollouts: each answer of a device with a higher
    desired version raises this database's version.

    Args:
        force: replace a database that is there; it is kept beside as ``fleet.db.before``.

    Raises:
        FleetError: the file is no backup, a controller runs on the state folder, or it holds a database already.
        StorageError: the folder cannot be written.
    """
    folder = state_folder(state)
    _check(file)
    with _storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with only_controller(folder), alone(folder / "fleet.lock"):
        target = folder / _NAME
        if target.exists() and not force:
            raise FleetError(
                "there is a state database already",
                where=str(target),
                remedy="Give --force to replace it (it is kept as fleet.db.before), or another --state",
            )
        with _beside(target) as temporary:
            _copy(file, temporary)
            with _storage_errors(target):
                _keep(target)
    with contextlib.closing(Database(folder)) as database, database.write() as session:
        note_change(session)
        devices = int(session.value("SELECT count(*) FROM device WHERE NOT removed"))
        incomplete = _incomplete(session, Repository(folder))
    return Restored(file=file, devices=devices, incomplete=incomplete)


def _check(file: Path) -> None:
    if not file.is_file():
        raise StorageError("there is no such file", where=str(file))
    try:
        with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro&immutable=1", uri=True)) as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            sound = connection.execute("PRAGMA quick_check").fetchone()[0]
            connection.execute("SELECT value FROM meta WHERE key = 'client_id'").fetchone()
    except sqlite3.DatabaseError as error:
        raise FleetError(f"is not a backup of the state database: {error}", where=str(file)) from error
    if sound != "ok":
        raise FleetError(f"the backup is damaged: {sound}", where=str(file))
    if not 0 < version <= schema.VERSION:
        raise FleetError(
            f"its schema is version {version}, this Kedge reads {schema.VERSION}",
            where=str(file),
            remedy="Use the version of Kedge that wrote it",
        )


def _copy(source: Path, target: Path) -> int:
    """Copy a database, its log included; return the number of devices in the copy."""
    try:
        with (
            contextlib.closing(sqlite3.connect(source, timeout=15.0)) as read,
            contextlib.closing(sqlite3.connect(target)) as written,
        ):
            read.backup(written)
            # One file, without a log beside it.
            written.execute("PRAGMA journal_mode = DELETE")
            return int(written.execute("SELECT count(*) FROM device WHERE NOT removed").fetchone()[0])
    except sqlite3.DatabaseError as error:
        raise StorageError(
            f"the database cannot be copied: {error}", where=str(target), remedy="Check the disk's space and rights"
        ) from error


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Yield a new file that replaces ``path``, synced, if the block succeeds; otherwise it is removed."""
    with _storage_errors(path), files.replacement(path, mode=0o600) as temporary:
        try:
            yield temporary
        finally:
            for end in ("-wal", "-shm", "-journal"):
                Path(f"{temporary}{end}").unlink(missing_ok=True)


def _keep(target: Path) -> None:
    """Move the existing database aside and remove its log, which would otherwise be read into the new one."""
    if target.exists():
        before = target.with_name(_BEFORE)
        before.unlink(missing_ok=True)
        _copy(target, before)
    for end in ("-wal", "-shm"):
        Path(f"{target}{end}").unlink(missing_ok=True)


@contextlib.contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot be written: {error.strerror}", where=str(path)) from error


def _incomplete(session: Session, repository: Repository) -> tuple[str, ...]:
    query = """
        SELECT DISTINCT name || ':' || version AS reference, blob.digest, blob.size FROM blob
        JOIN bundle_blob ON bundle_blob.digest = blob.digest JOIN bundle ON bundle.id = bundle_id
        JOIN release ON release.id = release_id ORDER BY release.id
    """
    rows = session.rows(query)
    missing = set(repository.missing({row["digest"]: row["size"] for row in rows}))
    return tuple(dict.fromkeys(row["reference"] for row in rows if row["digest"] in missing))
