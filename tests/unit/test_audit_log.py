"""The audit log records who did what, and shows what was changed, taken out or cut off."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from kedge.fleet import audit
from kedge.fleet.database import Session
from kedge.fleet.service import FleetService
from kedge_protocol.errors import FleetError, KedgeError


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[FleetService]:
    with FleetService(tmp_path, actor="ada@desk") as service:
        for number in range(5):
            service.device_add(f"pi-{number}", "rpi4", {"site": "berlin"})
        yield service


def tamper(fleet: FleetService, statement: str) -> None:
    """Do what an attacker with the file can do: drop the triggers, then change an entry."""
    with contextlib.closing(sqlite3.connect(fleet.database.path)) as connection:
        for trigger in ("audit_is_not_changed", "audit_is_not_shortened"):
            connection.execute(f"DROP TRIGGER {trigger}")
        connection.execute(statement)
        connection.commit()


def test_each_verb_leaves_an_entry_with_its_actor_and_its_options(fleet: FleetService) -> None:
    fleet.device_edit("pi-1", {"site": "paris"})
    fleet.device_remove("pi-2")
    newest, edited, *_ = fleet.audit_log()
    assert (newest.action, newest.subject, newest.actor) == ("device.remove", "pi-2", "ada@desk")
    assert (edited.action, edited.evidence) == ("device.edit", {"labels": {"site": "paris"}, "without": []})
    assert [entry.action for entry in fleet.audit_log(subject="pi-1")] == ["device.edit", "device.add"]
    assert fleet.audit_verify() == newest.hash


def test_a_verb_that_fails_leaves_no_entry(fleet: FleetService) -> None:
    before = fleet.audit_log()
    with pytest.raises(FleetError):
        fleet.device_remove("nobody")
    assert fleet.audit_log() == before


@pytest.mark.parametrize("statement", ["UPDATE audit SET actor = 'eve'", "DELETE FROM audit WHERE id = 2"])
def test_the_database_refuses_to_change_an_entry(fleet: FleetService, statement: str) -> None:
    def attempt(session: Session) -> None:
        session.run(statement)

    with pytest.raises((KedgeError, sqlite3.IntegrityError), match="append-only"), fleet.database.write() as session:
        attempt(session)
    fleet.audit_verify()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit SET actor = 'eve' WHERE id = 3",
        "UPDATE audit SET at = at + 1 WHERE id = 1",
        "UPDATE audit SET evidence = '{}' WHERE id = 2",
        "DELETE FROM audit WHERE id = 3",
        "DELETE FROM audit WHERE id = 1",
        "UPDATE audit SET id = 9 WHERE id = 5",
    ],
)
def test_a_changed_or_missing_entry_breaks_the_chain(fleet: FleetService, statement: str) -> None:
    fleet.audit_verify()
    tamper(fleet, statement)
    with pytest.raises(FleetError, match="audit log is broken at entry"):
        fleet.audit_verify()


def test_a_log_whose_end_was_cut_off_does_not_hold_the_head_that_was_noted(fleet: FleetService) -> None:
    head = fleet.audit_verify()
    fleet.device_edit("pi-0", {"site": "rome"})
    assert fleet.audit_verify(expect=head[:12]) == fleet.audit_log()[0].hash
    tamper(fleet, "DELETE FROM audit WHERE id >= 5")
    fleet.audit_verify()
    with pytest.raises(FleetError, match="cut off"):
        fleet.audit_verify(expect=head[:12])


def test_the_first_entry_of_a_log_has_a_hash_that_anybody_can_compute(fleet: FleetService) -> None:
    import hashlib
    import json

    first = fleet.audit_log()[-1]
    content = [
        audit.NOTHING,
        1,
        first.at,
        "ada@desk",
        "device.add",
        "pi-0",
        '{"labels":{"site":"berlin"},"target":"rpi4"}',
    ]
    assert first.hash == hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()


@pytest.mark.parametrize("head", ["", "12", "xyzxyzxyz", "A" * 12])
def test_what_is_no_hash_cannot_be_expected(fleet: FleetService, head: str) -> None:
    with pytest.raises(FleetError, match="no hash"):
        fleet.audit_verify(expect=head)


def test_the_command_lists_entries_and_prints_the_head(fleet: FleetService) -> None:
    from click.testing import CliRunner

    from kedge.cli.audit import audit as command

    state = ["--state", str(fleet.state)]
    listed = CliRunner().invoke(command, ["list", "--subject", "pi-3", *state])
    assert "device.add" in listed.output
    assert "pi-4" not in listed.output
    assert CliRunner().invoke(command, ["verify", *state]).output.strip() == fleet.audit_verify()
