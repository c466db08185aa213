"""The state folder and its database: SQLite with a write-ahead log, shared by the command line and the controller."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, create_engine, event, select
from sqlalchemy.exc import DatabaseError, OperationalError
from sqlalchemy.orm import Session

from kedge.fleet.tables import SCHEMA_VERSION, Base, Meta
from kedge_protocol.errors import FleetError, StorageError

BUSY_SECONDS = 15.0
"""How long a process waits for another's write."""

_BEFORE_LATENCIES = 1


def state_folder(given: Path | None = None) -> Path:
    """The state folder: as given, or ``KEDGE_FLEET_STATE``, or ``fleet`` in Kedge's data folder (``KEDGE_DATA``,
    ``XDG_DATA_HOME/kedge``, ``~/.local/share/kedge``)."""
    if given is not None:
        return given
    if named := os.environ.get("KEDGE_FLEET_STATE"):
        return Path(named)
    if data := os.environ.get("KEDGE_DATA"):
        return Path(data) / "fleet"
    home = os.environ.get("XDG_DATA_HOME")
    return (Path(home) if home else Path.home() / ".local" / "share") / "kedge" / "fleet"


class Database:
    """The database of a state folder, made where it is not there. Safe to use from several threads.

    Raises:
        StorageError: the folder cannot be written.
        FleetError: the database is of another version of Kedge, or is none.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "fleet.db"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"cannot be made: {error.strerror}", where=str(folder), remedy="Choose another --state"
            ) from error
        self._engine = create_engine(f"sqlite:///{self.path}", connect_args={"timeout": BUSY_SECONDS})
        event.listen(self._engine, "connect", _on_connect)
        event.listen(self._engine, "begin", _on_begin)
        # A new database is put into write-ahead mode once; who comes at that moment would be told "locked" at once.
        with _alone(folder / "fleet.lock"):
            self._prepare()

    def _prepare(self) -> None:
        with self.write() as session:
            connection = session.connection()
            version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
            if version not in (0, _BEFORE_LATENCIES, SCHEMA_VERSION):
                raise FleetError(
                    f"its schema is version {version}, this Kedge reads {SCHEMA_VERSION}",
                    where=str(self.path),
                    remedy="Use the version of Kedge that wrote it, or another --state",
                )
            if version != SCHEMA_VERSION:
                # Of an earlier version only tables are missing.
                Base.metadata.create_all(connection)
            if version == 0:
                session.add(Meta(key="client_id", value=f"kedge-controller-{uuid.uuid4().hex[:12]}"))
                session.add(Meta(key="changes", value="0"))
                session.flush()
            if version != SCHEMA_VERSION:
                connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")

    @contextlib.contextmanager
    def read(self) -> Iterator[Session]:
        """A session that sees one state and writes nothing."""
        with self._translated(), Session(self._engine) as session:
            yield session

    @contextlib.contextmanager
    def write(self) -> Iterator[Session]:
        """A session that holds the write lock from its beginning and is committed when the block ends well."""
        with self._translated(), Session(self._engine.execution_options(kedge_write=True)) as session, session.begin():
            yield session

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except OperationalError as error:
            raise StorageError(
                f"the database does not answer: {error.orig}",
                where=str(self.path),
                remedy="Check the disk's space and the folder's rights; is another process holding it?",
            ) from error
        except DatabaseError as error:
            raise FleetError(f"is not a sound database: {error.orig}", where=str(self.path)) from error

    def changes(self) -> int:
        """A number that grows when the controller has something to do; cheap."""
        with self.read() as session:
            return int(session.execute(select(Meta.value).where(Meta.key == "changes")).scalar_one())

    def close(self) -> None:
        """Give the file back."""
        self._engine.dispose()


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock between processes; it goes with the process that holds it."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise StorageError(f"cannot be written: {error.strerror}", where=str(path)) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def note_change(session: Session) -> None:
    """Wake the controller when this session is committed."""
    row = session.get_one(Meta, "changes")
    row.value = str(int(row.value) + 1)


def meta(session: Session, key: str) -> str:
    """A single value."""
    return session.get_one(Meta, key).value


def _on_connect(connection: sqlite3.Connection, _: Any) -> None:
    # The driver's own transactions begin too late (at the first write) and break snapshots; see _on_begin.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = NORMAL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _on_begin(connection: Connection) -> None:
    # A transaction that read first cannot wait for the write lock: SQLite fails it at once.
    writes = connection.get_execution_options().get("kedge_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
