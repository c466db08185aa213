"""The state folder and its database: SQLite with a write-ahead log, shared by the command line and the controller.

SQL is written by hand on the standard library's driver: a library of objects above it cost each command more than all
its work, and each message thirty times its statement (decision 018).
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kedge.fleet import device_reports, schema
from kedge_protocol import codec, files
from kedge_protocol.errors import FleetError, MessageError, StorageError
from kedge_protocol.folders import data_folder
from kedge_protocol.messages import Reported

BUSY_SECONDS = 15.0
"""Seconds that a process waits for another's write."""
WAKE = "fleet.wake"
"""File beside the database, touched after each change that concerns the controller, so that it need not poll the
database."""
PARAMETERS = 900
"""Largest number of values in one statement; older SQLite versions limit it to 999."""

Row = sqlite3.Row
Clock = Callable[[], float]
"""Returns seconds."""
Values = Sequence[Any] | dict[str, Any]


def state_folder(given: Path | None = None) -> Path:
    """The state folder: as given, or ``KEDGE_FLEET_STATE``, or ``fleet`` in Kedge's data folder (``KEDGE_DATA``,
    ``XDG_DATA_HOME/kedge``, ``~/.local/share/kedge``)."""
    if given is not None:
        return given
    if named := os.environ.get("KEDGE_FLEET_STATE"):
        return Path(named)
    return data_folder() / "fleet"


class Session:
    """One transaction. Rows are read by column name.

    Attributes:
        changed: whether the controller has something to do once this is committed, see :func:`note_change`.
        now: the fleet's clock; returns seconds since 1970.
    """

    def __init__(self, connection: sqlite3.Connection, clock: Clock = time.time) -> None:
        self._connection = connection
        self.changed = False
        self.now = clock

    def rows(self, sql: str, values: Values = ()) -> list[Row]:
        """Return all rows of a query."""
        return self._connection.execute(sql, values).fetchall()

    def row(self, sql: str, values: Values = ()) -> Row | None:
        """Return the first row of a query."""
        found: Row | None = self._connection.execute(sql, values).fetchone()
        return found

    def value(self, sql: str, values: Values = ()) -> Any:
        """Return the first column of the first row; None without a row."""
        found = self._connection.execute(sql, values).fetchone()
        return None if found is None else found[0]

    def run(self, sql: str, values: Values = ()) -> int:
        """Run a writing statement; return the number of changed rows."""
        return self._connection.execute(sql, values).rowcount

    def insert(self, sql: str, values: Values = ()) -> int:
        """Run an ``INSERT``; return the row's number."""
        return int(self._connection.execute(sql, values).lastrowid or 0)

    def run_many(self, sql: str, values: Iterable[Values]) -> None:
        """Run the same statement for many parameters."""
        self._connection.executemany(sql, values)

    def where_in(self, sql: str, values: Sequence[Any]) -> list[Row]:
        """Run a query whose ``{}`` stands for a list of any length."""
        found = []
        for start in range(0, len(values), PARAMETERS):
            some = values[start : start + PARAMETERS]
            found += self.rows(sql.format(f"({','.join('?' * len(some))})"), some)
        return found


class Database:
    """The database of a state folder, created if missing. It may be used from several threads.

    Args:
        folder: the state folder.
        clock: the fleet's clock, in seconds since 1970; a simulation gives its own.

    Raises:
        StorageError: the folder cannot be written.
        FleetError: the database is of another version of Kedge, or is none.
    """

    def __init__(self, folder: Path, *, clock: Clock = time.time) -> None:
        self.path = folder / "fleet.db"
        self.clock = clock
        self._wake = folder / WAKE
        self._idle: list[sqlite3.Connection] = []
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"cannot be made: {error.strerror}", where=str(folder), remedy="Choose another --state"
            ) from error
        if not self._is_prepared():
            # A new database is put into write-ahead mode once; who comes then would be told "locked" at once.
            with alone(folder / "fleet.lock"):
                self._prepare()

    def _is_prepared(self) -> bool:
        """Return whether the database exists in this version, without waiting for a writer."""
        if not self.path.is_file() or not self.path.stat().st_size:
            return False
        with self._translated(), self._connection() as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            mode = connection.execute("PRAGMA journal_mode").fetchone()[0]
        return (version, mode) == (schema.VERSION, "wal")

    def _prepare(self) -> None:
        with self._translated(), self._connection() as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version > schema.VERSION:
                raise FleetError(
                    f"its schema is version {version}, this Kedge reads {schema.VERSION}",
                    where=str(self.path),
                    remedy="Use the version of Kedge that wrote it, or another --state",
                )
            connection.execute("PRAGMA journal_mode = WAL")
        if version == schema.VERSION:
            return
        with self.write() as session:
            if version:
                _bring_up(session, version)
            _run_script(session, schema.TABLES)
            for trigger in schema.TRIGGERS:
                session.run(trigger)
            if not version:
                client = f"kedge-controller-{uuid.uuid4().hex[:12]}"
                session.run_many("INSERT INTO meta VALUES (?, ?)", [("client_id", client), ("changes", "0")])
            session.run(f"PRAGMA user_version = {schema.VERSION}")

    @contextlib.contextmanager
    def read(self) -> Iterator[Session]:
        """Yield a read-only session with a consistent view; it waits for nobody."""
        with self._translated(), self._connection() as connection:
            connection.execute("BEGIN")
            try:
                yield Session(connection, self.clock)
            finally:
                connection.rollback()

    @contextlib.contextmanager
    def write(self) -> Iterator[Session]:
        """Yield a session that holds the write lock from the start and commits if the block succeeds."""
        with self._translated(), self._connection() as connection:
            # A transaction that read first cannot wait for the write lock: SQLite fails it at once.
            connection.execute("BEGIN IMMEDIATE")
            session = Session(connection, self.clock)
            try:
                yield session
                connection.commit()
            except BaseException:
                connection.rollback()
                raise
        if session.changed:
            self._touch()

    def _touch(self) -> None:
        now = time.time_ns()
        # Where it cannot be done: the controller asks by itself too, seldom.
        with contextlib.suppress(OSError):
            self._wake.touch()
            os.utime(self._wake, ns=(now, now))

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        if connection is None:
            connection = _connected(self.path)
        try:
            yield connection
        except BaseException:
            connection.close()
            raise
        with self._lock:
            self._idle.append(connection)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise self._trouble(error) from error
        except sqlite3.DatabaseError as error:
            raise FleetError(f"is not a sound database: {error}", where=str(self.path)) from error

    def _trouble(self, error: sqlite3.OperationalError) -> StorageError:
        if "locked" in str(error):
            return StorageError(
                f"the database is locked: another command of Kedge, or its controller, has been writing for"
                f" {BUSY_SECONDS:.0f} s",
                where=str(self.path),
                remedy="Try again when it is done; a process that hangs can be found with: fuser " + str(self.path),
            )
        return StorageError(
            f"the database does not answer: {error}",
            where=str(self.path),
            remedy="Check the disk's space and the folder's rights",
        )

    def changes(self) -> int:
        """Return a number that grows when the controller has something to do."""
        with self.read() as session:
            return int(meta(session, "changes"))

    def wakened(self) -> int:
        """Return the time (ns) of the last change that concerns the controller; 0 for never. It does not read the
        database."""
        try:
            return self._wake.stat().st_mtime_ns
        except OSError:
            return 0

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            while self._idle:
                self._idle.pop().close()


class ChangeWatch:
    """Sees that somebody, in any process, committed to the database.

    Args:
        database: whose; one thread at a time may ask.
    """

    def __init__(self, database: Database) -> None:
        self._connection = _connected(database.path)

    def number(self) -> int:
        """Return a number that differs from the last one if there was a commit in between."""
        return int(self._connection.execute("PRAGMA data_version").fetchone()[0])

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def _connected(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    try:
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA foreign_keys = ON")
    except BaseException:
        connection.close()
        raise
    return connection


def _run_script(session: Session, script: str) -> None:
    """Run a script statement by statement, all in one transaction."""
    for statement in script.split(";"):
        if statement.strip():
            session.run(statement)


def _bring_up(session: Session, before: int) -> None:
    """Upgrade a database of version ``before`` to this version."""
    there = {row["name"] for row in session.rows("SELECT name FROM sqlite_master WHERE type = 'table'")}
    for version, columns in sorted(schema.NEW_COLUMNS.items()):
        # A table that is newer than the database is made whole below.
        known = [one for one in columns.split(";") if one.strip() and one.split()[2] in there]
        if before < version:
            _run_script(session, ";".join(known))
    if before < 6:
        _run_script(session, schema.SET_ASIDE)
    has_figures = before < 8 and "call_figures" in there
    if has_figures:
        session.run(schema.SET_FIGURES_ASIDE)
    _run_script(session, schema.TABLES)
    if before < 6:
        _run_script(session, schema.PUT_BACK)
    if has_figures:
        _run_script(session, schema.PUT_FIGURES_BACK)
    if before >= 3:
        return
    _run_script(session, schema.SUPERSEDE)
    for row in session.rows("SELECT device_id, reported FROM device_state WHERE reported IS NOT NULL"):
        # One that this Kedge cannot read is read when the device reports anew.
        with contextlib.suppress(MessageError):
            device_reports.note(
                session, row["device_id"], codec.decode(row["reported"], Reported, where="an earlier report")
            )


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold a lock between processes; it is released with the process.

    Raises:
        StorageError: the file cannot be made.
    """
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(files.locked(path))
        except OSError as error:
            raise StorageError(f"cannot be written: {error.strerror}", where=str(path)) from error
        yield


def note_change(session: Session) -> None:
    """Wake the controller when this session commits."""
    session.run("UPDATE meta SET value = CAST(value AS INTEGER) + 1 WHERE key = 'changes'")
    session.changed = True


def meta(session: Session, key: str) -> str:
    """Return a single value."""
    return str(session.value("SELECT value FROM meta WHERE key = ?", (key,)))
