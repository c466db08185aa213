"""What the shadows of a fleet answered, told by few statements however many devices there are."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.staged_fleet import StagedFleet, layouts

from kedge.fleet import shadows
from kedge.fleet.database import Session

TARGETS = ("rpi4",)


def test_all_that_a_shadow_answered_is_shown_and_not_only_the_latest_messages(tmp_path: Path) -> None:
    with StagedFleet(tmp_path, layouts(tmp_path, TARGETS)) as fleet:
        names = fleet.add(3)
        fleet.settle("1.0")
        for name in names[:2]:
            fleet.devices[name].disagrees = 5
        assert shadows.start(fleet.service, "tiny:2.0", {}) == tuple(names)
        fleet.step(80 * 30, every=30)
        first, second, third = shadows.show(fleet.service)
        assert (first.compared, first.compared % 50) == (second.compared, 0)
        assert first.compared > 70 * 50
        assert first.agreed == 0.9 * first.compared
        assert first.worst == ("cat", 0.9)
        assert first.digest == fleet.digest("2.0")
        assert (third.compared, third.confidence_shift, third.worst) == (0, None, None)
        assert shadows.show(fleet.service, device=names[1]) == (second,)
        assert shadows.show(fleet.service, "another") == ()


def test_it_takes_as_many_statements_whatever_the_number_of_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    rows, row, value = Session.rows, Session.row, Session.value
    monkeypatch.setattr(Session, "rows", lambda self, sql, values=(): (asked.append(sql), rows(self, sql, values))[1])
    monkeypatch.setattr(Session, "row", lambda self, sql, values=(): (asked.append(sql), row(self, sql, values))[1])
    monkeypatch.setattr(Session, "value", lambda self, sql, values=(): (asked.append(sql), value(self, sql, values))[1])
    taken = []
    published = layouts(tmp_path, TARGETS)
    for devices in (2, 40):
        with StagedFleet(tmp_path / str(devices), published) as fleet:
            fleet.add(devices)
            fleet.settle("1.0")
            asked.clear()
            shadows.start(fleet.service, "tiny:2.0", {})
            shadows.show(fleet.service)
            taken.append(len(asked))
    assert taken[0] == taken[1]
