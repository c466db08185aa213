"""The fleet in counts, and the list of devices that a person looks through."""

from __future__ import annotations

from pathlib import Path

import pytest

from kedge.fleet import device_reports, devices
from kedge.fleet.overview import DeviceHealth, DeviceQuery
from kedge.fleet.service import FleetService
from kedge.page import drawing
from kedge_protocol import codec
from kedge_protocol.messages import ModelState, Reported, ReportedModel


@pytest.fixture
def fleet(tmp_path: Path) -> FleetService:
    made = FleetService(tmp_path)
    serving = ReportedModel(state=ModelState.SERVING, digest="sha256:1", version="1.0")
    says(made, "serving", {"a": serving})
    says(made, "failed", {"a": ReportedModel(state=ModelState.FAILED, digest="sha256:1", version="1.0"), "b": serving})
    says(made, "failed-and-away", {"a": ReportedModel(state=ModelState.FAILED)}, online=False)
    says(made, "busy", {"a": ReportedModel(state=ModelState.FETCHING)})
    says(made, "away", {"a": serving}, online=False)
    says(made, "idle", {})
    made.device_add("unheard", "rpi5", {"site": "Lyon"})
    return made


def says(fleet: FleetService, name: str, models: dict[str, ReportedModel], *, online: bool = True) -> None:
    """Let a device be there that reported these models."""
    fleet.device_add(name, "rpi4")
    reported = Reported(
        boot_id="boot",
        seq=1,
        target="rpi4",
        agent_version="0",
        architecture="aarch64",
        python="3.11",
        runtimes={},
        free_bytes=0,
        desired_version=0,
        models=models,
    )
    with fleet.database.write() as session:
        number = devices.find(session, name)
        session.run(
            "INSERT INTO device_state (device_id, online, boot_id, session, seen_at, reported, reported_boot_id,"
            " reported_seq, answered_version) VALUES (?, ?, 'boot', 1, 1.0, ?, 'boot', 1, 0)",
            (number, online, codec.encode(reported)),
        )
        device_reports.note(session, number, reported)


def test_every_device_is_counted_once_by_its_worst(fleet: FleetService) -> None:
    found = fleet.overview()
    assert (found.total, found.online) == (7, 4)
    assert found.health == {"failed": 2, "unheard": 1, "offline": 1, "updating": 1, "serving": 1, "idle": 1}
    assert {one.target: (one.total, one.online) for one in found.targets} == {"rpi4": (6, 4), "rpi5": (1, 0)}
    assert [(one.model, one.version, one.devices) for one in found.releases] == [("a", "1.0", 3), ("b", "1.0", 1)]


def test_devices_are_found_by_what_they_are(fleet: FleetService) -> None:
    def names(query: DeviceQuery) -> list[str]:
        return [one.name for one in fleet.device_find(query).devices]

    assert names(DeviceQuery(target="rpi5")) == ["unheard"]
    assert names(DeviceQuery(health=DeviceHealth.FAILED)) == ["failed", "failed-and-away"]
    assert names(DeviceQuery(model="b")) == ["failed"]
    assert names(DeviceQuery(model="a", version="2.0")) == []
    assert names(DeviceQuery(text="lyon")) == ["unheard"]
    assert names(DeviceQuery(text="%")) == []
    part = fleet.device_find(DeviceQuery(limit=2, offset=5))
    assert (part.total, [one.name for one in part.devices]) == (7, ["serving", "unheard"])


def test_cells_show_every_state_however_few(fleet: FleetService) -> None:
    drawn = drawing.cells({"failed": 1, "serving": 9999})
    assert drawn.each == 25
    assert {state: path.count("M") for state, path in drawn.paths.items()} == {"failed": 1, "serving": 400}
    assert drawing.cells({}).paths == {}


def test_a_line_leaves_gaps_and_starts_at_nothing() -> None:
    drawn = drawing.line([1.0, None, 3.0, 4.0])
    assert drawn is not None
    assert (drawn.low, drawn.high, drawn.last, drawn.line.count("M")) == (0.0, 4.0, 4.0, 2)
    assert drawing.line([None, 1.0]) is None
