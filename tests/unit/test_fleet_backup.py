"""A backup of a live database is whole, and what is put back is what was saved."""

from __future__ import annotations

import shutil
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.bundles import make_bundle

from kedge.fleet import backup
from kedge.fleet.controller_lock import only_controller
from kedge.fleet.service import FleetService
from kedge_protocol.errors import FleetError, StorageError


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("layouts"), target="rpi4")


@pytest.fixture
def fleet(tmp_path: Path, layout: Path) -> Iterator[FleetService]:
    with FleetService(tmp_path / "state") as made:
        made.publish(layout)
        made.device_add("pi", "rpi4", {"site": "x"})
        made.rollout_start("tiny:1.0")
        yield made


def restored(folder: Path, file: Path) -> FleetService:
    backup.restore(file, folder)
    return FleetService(folder)


def test_a_copy_of_the_file_alone_lacks_what_a_backup_has(fleet: FleetService, tmp_path: Path) -> None:
    # The log is not worked off while a connection is open: what was committed lies in it.
    assert Path(f"{fleet.database.path}-wal").stat().st_size > 0
    alone = tmp_path / "alone.db"
    shutil.copy(fleet.database.path, alone)
    with sqlite3.connect(alone) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        assert "device" not in tables or not connection.execute("SELECT count(*) FROM device").fetchone()[0]
    connection.close()
    saved = backup.save(tmp_path / "saved.db", fleet.state)
    assert (saved.devices, saved.bytes) == (1, (tmp_path / "saved.db").stat().st_size)
    with restored(tmp_path / "other", tmp_path / "saved.db") as again:
        assert again.devices() == fleet.devices()
        assert again.rollout_status() == fleet.rollout_status()
        assert again.releases() == fleet.releases()


def test_a_backup_amid_writing_is_of_one_moment(fleet: FleetService, tmp_path: Path) -> None:
    stop = threading.Event()

    def write() -> None:
        # Each pair is one transaction: a backup has both or none.
        number = 0
        with FleetService(fleet.state) as writer:
            while not stop.is_set():
                with writer.database.write() as session:
                    for half in "ab":
                        values = (f"{half}{number}", "rpi4", "{}")
                        session.run("INSERT INTO device VALUES (NULL, ?, ?, ?, 0, 0, 0, 0)", values)
                number += 1

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for attempt in range(5):
            file = tmp_path / f"{attempt}.db"
            backup.save(file, fleet.state)
            with restored(tmp_path / f"state-{attempt}", file) as again:
                names = {one.name for one in again.devices()} - {"pi"}
                assert {name[1:] for name in names if name[0] == "a"} == {name[1:] for name in names if name[0] == "b"}
    finally:
        stop.set()
        thread.join()


def test_restoring_over_a_database_keeps_the_old_one_and_its_log_is_not_read_into_the_new(
    fleet: FleetService, tmp_path: Path
) -> None:
    file = tmp_path / "saved.db"
    backup.save(file, fleet.state)
    fleet.device_add("later", "rpi4")
    with pytest.raises(FleetError, match="there is a state database already"):
        backup.restore(file, fleet.state)
    assert len(fleet.devices()) == 2
    done = backup.restore(file, fleet.state, force=True)
    assert (done.devices, done.incomplete) == (1, ())
    with FleetService(fleet.state) as again:
        assert [one.name for one in again.devices()] == ["pi"]
    with restored(tmp_path / "before", fleet.state / "fleet.db.before") as before:
        assert [one.name for one in before.devices()] == ["later", "pi"]


def test_a_restored_database_names_the_releases_whose_blobs_are_missing(
    fleet: FleetService, tmp_path: Path, layout: Path
) -> None:
    file = tmp_path / "saved.db"
    backup.save(file, fleet.state)
    assert backup.restore(file, tmp_path / "other").incomplete == ("tiny:1.0",)
    with FleetService(tmp_path / "other") as again:
        # Devices would ask for what is not there.
        with pytest.raises(StorageError, match="Publish the release again"):
            again.rollout_start("tiny:1.0")
        assert len(again.rollouts()) == 1
        assert not again.publish(layout).new
        again.rollout_start("tiny:1.0")
    assert backup.restore(file, tmp_path / "other", force=True).incomplete == ()


def test_what_is_no_backup_is_refused_and_nothing_is_touched(fleet: FleetService, tmp_path: Path) -> None:
    file = tmp_path / "saved.db"
    backup.save(file, fleet.state)
    raw = bytearray(file.read_bytes())
    for at in range(4096, len(raw), 512):
        raw[at : at + 64] = bytes(64)
    broken, text, foreign = tmp_path / "broken.db", tmp_path / "text.db", tmp_path / "foreign.db"
    broken.write_bytes(raw)
    text.write_text("this is no database" * 100, encoding="utf-8")
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE other (x)")
    connection.close()
    for wrong in (broken, text, foreign):
        with pytest.raises(FleetError):
            backup.restore(wrong, fleet.state, force=True)
    with pytest.raises(StorageError, match="no such file"):
        backup.restore(tmp_path / "none.db", fleet.state, force=True)
    with pytest.raises(FleetError, match="no state database"):
        backup.save(file, tmp_path / "nowhere")
    with only_controller(fleet.state), pytest.raises(FleetError, match="another controller runs"):
        backup.restore(file, fleet.state, force=True)
    assert [one.name for one in fleet.devices()] == ["pi"]
