"""What the database is asked does not grow with the fleet, and nobody who reads waits for who writes."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.support.bundles import make_bundle

from kedge.fleet import controller as controllers
from kedge.fleet import database, kit
from kedge.fleet.controller import Controller
from kedge.fleet.controller_store import ControllerStore
from kedge.fleet.inbox import Inbox
from kedge.fleet.options import KitOptions
from kedge.fleet.rollout_status import DeviceFilter
from kedge.fleet.service import FleetService
from kedge.fleet.transfer_counts import TransferCounts
from kedge_protocol import codec, topics
from kedge_protocol.broker import parse_broker
from kedge_protocol.errors import FleetError, StorageError
from kedge_protocol.messages import BlobKind, ModelState, Reported, ReportedModel, Status
from kedge_protocol.trust import Trust

SIZES = (10, 1000)


class Counting(sqlite3.Connection):
    """Counts statements; one for all rows of an ``executemany``."""

    statements = 0

    def execute(self, *arguments: Any) -> sqlite3.Cursor:
        Counting.statements += 1
        return super().execute(*arguments)

    def executemany(self, *arguments: Any) -> sqlite3.Cursor:
        Counting.statements += 1
        return super().executemany(*arguments)


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("layouts"), target="rpi4")


def fleet_of(folder: Path, layout: Path, size: int) -> FleetService:
    fleet = FleetService(folder / str(size))
    fleet.publish(layout)
    with fleet.database.write() as session:
        rows = [(f"d{number:04}", "rpi4", json.dumps({"half": str(number % 2)})) for number in range(size)]
        session.run_many("INSERT INTO device VALUES (NULL, ?, ?, ?, 0, 0, 0, 0)", rows)
        database.note_change(session)
    return fleet


def counted(verb: Callable[[], object]) -> int:
    before = Counting.statements
    verb()
    return Counting.statements - before


def telemetry(boot: str, seq: int) -> bytes:
    numbers = dict.fromkeys(
        ("cpu_percent", "memory_total_bytes", "memory_available_bytes", "agent_bytes", "free_bytes"), 1
    )
    return json.dumps({"boot_id": boot, "seq": seq, "interval": 5.0, "models": {}} | numbers).encode()


def report(seq: int, digest: str) -> bytes:
    model = ReportedModel(state=ModelState.SERVING, desired=digest, digest=digest, version="1.0", proved=True)
    reported = Reported(
        boot_id="one",
        seq=seq,
        target="rpi4",
        agent_version="0",
        architecture="x",
        python="3",
        runtimes={},
        free_bytes=0,
        desired_version=1,
        models={"tiny": model},
    )
    return codec.encode(reported)


def test_the_number_of_statements_does_not_grow_with_the_fleet(
    tmp_path: Path, layout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database.sqlite3, "connect", partial(sqlite3.connect, factory=Counting))
    found: dict[str, list[int]] = {}
    for size in SIZES:
        with fleet_of(tmp_path, layout, size) as fleet:
            records, inbox = ControllerStore(fleet.database), Inbox()
            inbox.know(records.snapshot().memories)
            names = list(inbox.known())
            for name in names:
                inbox.put(topics.status(name), codec.encode(Status(online=True, boot_id="one", session=1)), False)
                inbox.put(topics.telemetry(name, "metrics"), telemetry("one", 1), False)

            def write(records: ControllerStore = records, inbox: Inbox = inbox) -> None:
                records.write(inbox.digest())
                inbox.written()

            def more_telemetry(inbox: Inbox = inbox, names: list[str] = names, write: Any = write) -> None:
                for name in names:
                    inbox.put(topics.telemetry(name, "metrics"), telemetry("one", 2), False)
                write()

            verbs: dict[str, Callable[[], object]] = {
                "births and telemetry": write,
                "telemetry": more_telemetry,
                "roster": lambda fleet=fleet: ControllerStore(fleet.database).snapshot(),
                "device list": lambda fleet=fleet: fleet.device_list({"half": "0"}, limit=20),
                "rollout start": lambda fleet=fleet: fleet.rollout_start("tiny:1.0"),
                "rollout status": lambda fleet=fleet: fleet.rollout_status(shown=DeviceFilter(limit=20)),
                "rollout list": lambda fleet=fleet: fleet.rollouts(),
                "wishes": lambda records=records, names=names: records.publications(names[:256]),
                "rollout revert": lambda fleet=fleet: fleet.rollout_revert(),
            }
            for name, verb in verbs.items():
                found.setdefault(name, []).append(counted(verb))
    # Lists of more than some hundred values are asked for in parts.
    grown = {name: counts for name, counts in found.items() if counts[1] > counts[0] + 3}
    assert not grown
    # Of 1000 devices: the messages, and the figures summed from them, read in two parts and written.
    assert found["telemetry"][1] <= 9


def test_a_batch_of_reports_is_one_transaction_and_a_few_statements_each(
    tmp_path: Path, layout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database.sqlite3, "connect", partial(sqlite3.connect, factory=Counting))
    with fleet_of(tmp_path, layout, 100) as fleet:
        digest = fleet.rollout_start("tiny:1.0").rollout.devices[0].digest or ""
        records, inbox = ControllerStore(fleet.database), Inbox()
        inbox.know(records.snapshot().memories)
        for name in inbox.known():
            for seq in range(1, 4):
                inbox.put(topics.reported(name), report(seq, digest), False)
        taken = counted(lambda: records.write(inbox.digest()))
        assert taken <= 6 * 100 + 10
        assert fleet.rollout_status().counts == {"done": 100}


def test_the_ledger_asks_once_for_a_device_whatever_it_pulls(
    tmp_path: Path, layout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database.sqlite3, "connect", partial(sqlite3.connect, factory=Counting))
    with fleet_of(tmp_path, layout, 2) as fleet:
        ledger = TransferCounts(fleet.database)

        def pull(device: int) -> None:
            for blob in range(20):
                key = (device, f"sha256:{blob:064}", BlobKind.BLOB)
                ledger.told(key, 1)
                ledger.served(key, 1, 10, again=ledger.finished(key, 1))

        assert counted(lambda: pull(1)) <= 5
        assert counted(lambda: pull(1)) == 0


def test_readers_do_not_wait_for_a_writer_and_opening_writes_nothing(tmp_path: Path, layout: Path) -> None:
    with fleet_of(tmp_path, layout, 10) as fleet:
        fleet.rollout_start("tiny:1.0")
        other = sqlite3.connect(fleet.database.path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with FleetService(fleet.state) as second:
            assert len(second.devices()) == 10
            assert second.device_list().total == 10
            assert second.rollout_status().counts == {"offline": 10}
        other.close()


def test_a_lock_that_is_held_too_long_is_told_as_kedges_own(
    tmp_path: Path, layout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.05)
    with fleet_of(tmp_path, layout, 1) as fleet:
        other = sqlite3.connect(fleet.database.path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageError, match="another command of Kedge, or its controller"):
            fleet.device_add("x", "rpi4")
        other.close()


def test_nobody_waits_while_a_kit_is_made(tmp_path: Path, layout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.05)
    made: list[Path] = []

    def slow(name: str, target: str, options: KitOptions, trust: Trust | None) -> None:
        with FleetService(tmp_path / "1") as other:
            other.device_add("meanwhile", "rpi4")
        made.append(options.kit or Path())

    with fleet_of(tmp_path, layout, 1) as fleet:
        monkeypatch.setattr(kit, "write", slow)
        fleet.device_add("pi", "rpi4", options=KitOptions(kit=tmp_path / "kit.tar.gz"))
        assert {"pi", "meanwhile"} <= {one.name for one in fleet.devices()}
        with pytest.raises(FleetError, match="already"):
            fleet.device_add("pi", "rpi4", options=KitOptions(kit=tmp_path / "other.tar.gz"))
        assert made == [tmp_path / "kit.tar.gz"]


def test_a_verb_wakes_the_controller_without_a_question(tmp_path: Path, layout: Path) -> None:
    with fleet_of(tmp_path, layout, 1) as fleet:
        before = fleet.database.wakened()
        fleet.rollout_start("tiny:1.0")
        after = fleet.database.wakened()
        assert after > before
        fleet.devices()
        fleet.rollout_status()
        assert fleet.database.wakened() == after


def test_a_controller_with_nothing_to_do_asks_nothing_and_finds_what_no_verb_told_it(
    tmp_path: Path, layout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database.sqlite3, "connect", partial(sqlite3.connect, factory=Counting))
    with (
        fleet_of(tmp_path, layout, 10) as fleet,
        Controller(fleet.state, parse_broker("mqtt://127.0.0.1:1")) as controller,
    ):
        controller.tick()
        assert counted(lambda: [controller.tick() for _ in range(50)]) == 0
        fleet.device_add("told", "rpi4")
        assert counted(controller.tick) > 0
        assert counted(controller.tick) == 0
        # A verb that died between its commit and its word.
        with fleet.database.write() as session:
            database.note_change(session)
            session.changed = False
        assert counted(controller.tick) == 0
        monkeypatch.setattr(controllers, "LOOK_SECONDS", 0.0)
        assert counted(controller.tick) > 0


def test_commands_of_the_fleet_load_nothing_heavy(tmp_path: Path) -> None:
    heavy = ("numpy", "rich", "sqlalchemy", "amqtt", "paho", "onnx", "asyncio", "ssl", "kedge.fleet.controller")
    for arguments in (["device", "list"], ["rollout", "list"], ["release", "list"], ["device", "show", "--help"]):
        program = (
            "import sys\nfrom kedge.cli.main import main\n"
            f"try: main({arguments!r})\nexcept SystemExit: pass\n"
            f"print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
        )
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "KEDGE_FLEET_STATE": str(tmp_path)},
        )
        assert done.stderr.splitlines()[-1] == "[]", arguments
