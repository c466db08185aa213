"""The count of blocks, against a plain model, over any number of restarts."""

from __future__ import annotations

import contextlib
import sqlite3
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kedge.fleet import database
from kedge.fleet.service import FleetService
from kedge.fleet.transfer_counts import TransferCounts
from kedge_protocol.errors import StorageError
from kedge_protocol.messages import BlobKind

KEYS = [("one", "sha256:" + "a" * 64), ("one", "sha256:" + "b" * 64), ("two", "sha256:" + "a" * 64)]
keys = st.sampled_from(KEYS)
blocks = st.integers(0, 70)


def serve(ledger: TransferCounts, key: tuple[int, str, BlobKind], index: int) -> None:
    """Hand one block over, as the block server does."""
    again = ledger.finished(key, index)
    ledger.served(key, index, 10, again=again)


class LedgerMachine(RuleBasedStateMachine):
    """What devices told and what they were served; the controller stops and starts between."""

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.fleet = FleetService(Path(self.folder.name))
        self.numbers = {}
        for name in ("one", "two"):
            self.fleet.device_add(name, "rpi4")
        with self.fleet.database.read() as session:
            for row in session.rows("SELECT id, name FROM device"):
                self.numbers[row["name"]] = row["id"]
        self.ledger = TransferCounts(self.fleet.database)
        self.served: dict[tuple[str, str], list[int]] = {key: [] for key in KEYS}
        self.again = dict.fromkeys(KEYS, 0)
        self.have: dict[tuple[str, str], set[int]] = {key: set() for key in KEYS}

    def key(self, key: tuple[str, str]) -> tuple[int, str, BlobKind]:
        return self.numbers[key[0]], key[1], BlobKind.BLOB

    @rule(key=keys, finished=st.sets(blocks))
    def told(self, key: tuple[str, str], finished: set[int]) -> None:
        self.ledger.told(self.key(key), sum(1 << index for index in finished))
        self.have[key] |= finished

    @rule(key=keys, index=blocks)
    def serve(self, key: tuple[str, str], index: int) -> None:
        serve(self.ledger, self.key(key), index)
        self.served[key].append(index)
        self.again[key] += index in self.have[key]

    @rule()
    def flush(self) -> None:
        self.ledger.flush()

    @rule()
    def restart(self) -> None:
        self.ledger.flush()
        self.ledger = TransferCounts(self.fleet.database)

    @invariant()
    def counts_are_the_models(self) -> None:
        if not hasattr(self, "ledger"):
            return
        self.ledger.flush()
        for name in ("one", "two"):
            found = {view.digest: view for view in self.fleet.transfers(name)}
            for device, digest in KEYS:
                key = (device, digest)
                if device != name or not (self.served[key] or self.have[key]):
                    continue
                view = found[digest]
                assert view.blocks_served == len(self.served[key])
                assert view.blocks_distinct == len(set(self.served[key]))
                assert view.finished_served_again == self.again[key]
                assert view.bytes_served == 10 * len(self.served[key])

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.fleet.close()
            self.folder.cleanup()


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(
    max_examples=15, stateful_step_count=15, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def test_a_removed_device_takes_its_counts_with_it(tmp_path: Path) -> None:
    with FleetService(tmp_path) as fleet:
        fleet.device_add("one", "rpi4")
        ledger = TransferCounts(fleet.database)
        serve(ledger, (1, KEYS[0][1], BlobKind.BLOB), 0)
        fleet.device_remove("one")
        ledger.flush()
        ledger.keep([])
        fleet.device_add("one", "rpi4")
        assert fleet.transfers("one") == ()


def test_a_failed_write_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.05)
    with FleetService(tmp_path) as fleet:
        fleet.device_add("one", "rpi4")
        ledger = TransferCounts(fleet.database)
        serve(ledger, (1, KEYS[0][1], BlobKind.BLOB), 3)
        with contextlib.closing(sqlite3.connect(tmp_path / "fleet.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(StorageError, match="locked"):
                ledger.flush()
        ledger.flush()
        (view,) = fleet.transfers("one")
        assert (view.blocks_served, view.blocks_distinct) == (1, 1)


def test_a_block_that_is_finished_while_it_is_handed_over_was_not_finished_before(tmp_path: Path) -> None:
    with FleetService(tmp_path) as fleet:
        fleet.device_add("one", "rpi4")
        ledger = TransferCounts(fleet.database)
        key = (1, KEYS[0][1], BlobKind.BLOB)
        before = ledger.finished(key, 5)
        ledger.told(key, 1 << 5)  # the device's next word overtakes the note of the handing over
        ledger.served(key, 5, 10, again=before)
        ledger.flush()
        assert fleet.transfers("one")[0].finished_served_again == 0
        serve(ledger, key, 5)
        ledger.flush()
        assert fleet.transfers("one")[0].finished_served_again == 1
