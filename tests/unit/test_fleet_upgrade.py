"""A database that an earlier Kedge wrote is brought up on opening, with what it knew."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest
from tests.support.bundles import make_bundle

from kedge.fleet import call_figures, schema, shadows
from kedge.fleet.service import FleetService
from kedge_protocol import codec
from kedge_protocol.errors import FleetError, StorageError
from kedge_protocol.messages import (
    Failure,
    ModelState,
    ModelTelemetry,
    Reported,
    ReportedModel,
    ShadowTelemetry,
    Telemetry,
)

ONE, TWO = "sha256:" + "1" * 64, "sha256:" + "2" * 64
OLD_BUNDLE = """
CREATE TABLE bundle (
    id INTEGER NOT NULL PRIMARY KEY, release_id INTEGER NOT NULL REFERENCES release (id), target VARCHAR NOT NULL,
    digest VARCHAR NOT NULL, size INTEGER NOT NULL, backend VARCHAR NOT NULL, precision VARCHAR NOT NULL,
    UNIQUE (release_id, target)
)
"""
OLD_FIGURES = """
CREATE TABLE call_figures (
    device_id INTEGER NOT NULL REFERENCES device (id), model VARCHAR NOT NULL, digest VARCHAR NOT NULL,
    since DOUBLE NOT NULL, until DOUBLE NOT NULL, document BLOB NOT NULL, PRIMARY KEY (device_id, model, digest)
) WITHOUT ROWID
"""


def reported() -> bytes:
    failure = Failure(digest=TWO, stage="prove", reason="no")
    model = ReportedModel(state=ModelState.FAILED, desired=TWO, digest=ONE, version="1.0", proved=True, failure=failure)
    return codec.encode(
        Reported(
            boot_id="b",
            seq=3,
            target="rpi5",
            agent_version="0",
            architecture="x",
            python="3",
            runtimes={},
            free_bytes=0,
            desired_version=2,
            models={"tiny": model},
        )
    )


def older(path: Path, version: int) -> None:
    """A database of an earlier version: today's tables without what came later."""
    path.parent.mkdir(exist_ok=True)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(schema.TABLES)
        later = ("assignment", "refused_bundle", "reported_model", "command", "audit")
        for table in (*later, *(("latency",) if version == 1 else ())):
            connection.execute(f"DROP TABLE {table}")
        refused = ("refused_version", "refused_reason", "refused_came", "refused_held")
        for column in ("told_target", "namesake", *refused):
            connection.execute(f"ALTER TABLE device_state DROP COLUMN {column}")
        connection.execute("ALTER TABLE rollout_device DROP COLUMN superseded_by")
        connection.execute("ALTER TABLE release DROP COLUMN statement")
        connection.execute("ALTER TABLE desired_model DROP COLUMN soak")
        for column in ("rival", "rival_size", "ordered"):
            connection.execute(f"ALTER TABLE desired_model DROP COLUMN {column}")
        without_editions(connection)
        connection.execute("DROP TABLE bundle")
        connection.execute(OLD_BUNDLE)
        connection.executescript(
            """
            INSERT INTO meta VALUES ('client_id', 'kedge-controller-old'), ('changes', '7');
            INSERT INTO device VALUES (1, 'a', 'rpi4', '{"site": "x"}', 1.0, 2, 1, 0);
            INSERT INTO device VALUES (2, 'b', 'rpi4', '{}', 1.0, 1, 1, 0);
            INSERT INTO release VALUES (1, 'tiny', '1.0', 'sha256:r', 1.0);
            INSERT INTO bundle VALUES (7, 1, 'rpi4', 'sha256:b', 10, 'tflite', 'int8');
            INSERT INTO blob VALUES ('sha256:b', 10);
            INSERT INTO bundle_blob VALUES (7, 'sha256:b');
            INSERT INTO rollout VALUES (1, 'tiny', '1.0', 'start', 'superseded', 1.0, '{}', NULL),
                (2, 'tiny', '2.0', 'start', 'active', 2.0, '{"site": "x"}', NULL);
            """
        )
        connection.executemany("INSERT INTO desired_model VALUES (?, 'tiny', ?, 10)", [(1, TWO), (2, ONE)])
        parts = [(1, 1, ONE, None, 1), (1, 2, ONE, None, 1), (2, 1, TWO, ONE, 2)]
        connection.executemany("INSERT INTO rollout_device VALUES (?, ?, ?, ?, 10, ?, 0)", parts)
        connection.execute("INSERT INTO device_state VALUES (1, 0, 'b', 1, 5.0, ?, 'b', 3, 2)", (reported(),))
        connection.execute(f"PRAGMA user_version = {version}")


def without_editions(connection: sqlite3.Connection) -> None:
    """Make the table of figures that of version 7."""
    connection.execute("ALTER TABLE call_figures RENAME TO newer")
    connection.execute(OLD_FIGURES)
    names = "device_id, model, digest, since, until, document"
    connection.execute(f"INSERT INTO call_figures SELECT {names} FROM newer")
    connection.execute("DROP TABLE newer")


@pytest.mark.parametrize("version", [1, 2])
def test_an_older_database_keeps_its_fleet_and_tells_rollouts_by_device(tmp_path: Path, version: int) -> None:
    older(tmp_path / "fleet.db", version)
    with FleetService(tmp_path) as fleet:
        assert {one.name: one.reported_target for one in fleet.devices()} == {"a": "rpi5", "b": None}
        (line, _) = fleet.device_list().devices
        assert (line.serves, line.labels) == ({"tiny": "1.0"}, {"site": "x"})
        assert fleet.rollout_status(2).counts == {"failed": 1}
        first = fleet.rollout_status(1)
        assert (first.state, first.counts) == ("active", {"offline": 1, "superseded": 1})
        assert fleet.latencies().measurements == ()
        (release,) = fleet.releases()
        assert [(one.target, one.backend, one.total_bytes) for one in release.bundles] == [("rpi4", "tflite", 10)]
    with FleetService(tmp_path) as again:
        assert again.database.changes() == 7


def test_a_database_of_version_5_may_hold_several_bundles_of_a_target_afterwards(tmp_path: Path) -> None:
    with FleetService(tmp_path) as fleet:
        fleet.publish(make_bundle(tmp_path, version="1.0", target=("rpi4", "rpi5")))
        fleet.device_add("pi", "rpi4")
        fleet.rollout_start("tiny:1.0")
        before = fleet.releases()
    with contextlib.closing(sqlite3.connect(tmp_path / "fleet.db", isolation_level=None)) as connection:
        connection.execute("DROP TABLE assignment")
        connection.execute("DROP TABLE refused_bundle")
        for column in ("rival", "rival_size", "ordered"):
            connection.execute(f"ALTER TABLE desired_model DROP COLUMN {column}")
        without_editions(connection)
        kept = "id, release_id, target, digest, size, backend, precision"
        connection.execute(f"CREATE TABLE kept AS SELECT {kept}, drift FROM bundle")
        connection.execute("PRAGMA foreign_keys = OFF")
        connection.execute("DROP TABLE bundle")
        connection.execute(OLD_BUNDLE)
        connection.execute("ALTER TABLE bundle ADD COLUMN drift VARCHAR")
        connection.execute("INSERT INTO bundle SELECT * FROM kept")
        connection.execute("DROP TABLE kept")
        connection.execute("PRAGMA user_version = 5")
    with FleetService(tmp_path) as fleet:
        assert fleet.releases() == before
        assert fleet.rollout_status().counts == {"offline": 1}
        fleet.publish(make_bundle(tmp_path, version="2.0", target="rpi4", also={"openvino": None}))
        fleet.rollout_start("tiny:2.0")
        (choice,) = fleet.rollout_status().choices
        assert (len(choice.backends), choice.measuring) == (2, 1)
        fleet.rollout_revert()
        fleet.release_remove("tiny:2.0")
        assert fleet.releases() == before


def test_a_database_of_version_7_knows_its_shadows_afterwards(tmp_path: Path) -> None:
    shadow = ShadowTelemetry(digest=TWO, compared=9, agreed=8)
    model = ModelTelemetry(
        digest=ONE, inferences=9, errors=0, inferences_total=9, errors_total=0, shadow=shadow
    )  # fmt: skip
    message = Telemetry(
        boot_id="b", seq=1, interval=20.0, models={"tiny": model}, cpu_percent=1.0, memory_total_bytes=9,
        memory_available_bytes=8, agent_bytes=7, free_bytes=6,
    )  # fmt: skip
    with FleetService(tmp_path) as fleet:
        fleet.device_add("pi", "rpi4")
        with fleet.database.write() as session:
            call_figures.note(session, {1: [(1.0, message)]})
            session.run("INSERT INTO desired_shadow VALUES (1, 'tiny', ?, 1, 0.1, 1)", (TWO,))
        (before,) = shadows.show(fleet)
    with contextlib.closing(sqlite3.connect(tmp_path / "fleet.db", isolation_level=None)) as connection:
        without_editions(connection)
        connection.execute("PRAGMA user_version = 7")
    with FleetService(tmp_path) as fleet:
        assert shadows.show(fleet) == (before,)
        assert (before.compared, before.agreed) == (9, 8)


def test_a_way_up_that_fails_leaves_the_older_database_as_it_was(tmp_path: Path) -> None:
    older(tmp_path / "fleet.db", 2)
    with contextlib.closing(sqlite3.connect(tmp_path / "fleet.db", isolation_level=None)) as connection:
        connection.execute("ALTER TABLE rollout_device ADD COLUMN superseded_by INTEGER")
    with pytest.raises(StorageError, match="duplicate column"):
        FleetService(tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "fleet.db")) as connection:
        assert connection.execute("PRAGMA user_version").fetchone()[0] == 2
        assert "told_target" not in str(connection.execute("SELECT sql FROM sqlite_master").fetchall())


def test_a_report_that_cannot_be_read_any_more_does_not_keep_the_fleet_out(tmp_path: Path) -> None:
    older(tmp_path / "fleet.db", 2)
    with contextlib.closing(sqlite3.connect(tmp_path / "fleet.db", isolation_level=None)) as connection:
        connection.execute("UPDATE device_state SET reported = X'5B'")
    with FleetService(tmp_path) as fleet:
        assert fleet.device_list().total == 2


def test_a_newer_database_is_left_alone(tmp_path: Path) -> None:
    older(tmp_path / "fleet.db", schema.VERSION + 1)
    with pytest.raises(FleetError, match="its schema is version"):
        FleetService(tmp_path)
