"""The controller's log names the cohort that drifts, by target and by each label."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.bundles import make_bundle

from kedge.fleet import drift as watched
from kedge.fleet.service import FleetService
from kedge_protocol.drift import Kind, Statistic, Stream
from kedge_protocol.messages import ModelTelemetry, Telemetry

STREAM = Stream(kind=Kind.INPUT, tensor="x", statistic=Statistic.MEAN, edges=(0.0,), counts=(500, 500))


def test_the_alarm_in_the_log_names_the_site_that_drifts_and_when_it_ends(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = make_bundle(tmp_path, "tiny", "1.0")
    with FleetService(tmp_path / "fleet") as fleet:
        fleet.publish(bundle)
        digest = fleet.releases()[0].bundles[0].digest
        with fleet.database.write() as session:
            session.run("UPDATE bundle SET drift = ?", (watched.document([STREAM]),))
        for number in range(6):
            site = "berlin" if number < 2 else "rome"
            fleet.device_add(f"d{number}", "generic-cpu", {"site": site, "serial": f"s{number}"})

        def count(counts: tuple[int, ...], names: range) -> None:
            for number in names:
                with fleet.database.write() as session:
                    row = session.value("SELECT id FROM device WHERE name = ?", (f"d{number}",))
                    told = ModelTelemetry(
                        digest=digest, inferences=1, errors=0, inferences_total=1, errors_total=0,
                        drift={STREAM.name: counts},
                    )  # fmt: skip
                    message = Telemetry(
                        boot_id="b", seq=1, interval=1.0, models={"tiny": told}, cpu_percent=0.0, memory_total_bytes=1,
                        memory_available_bytes=1, agent_bytes=1, free_bytes=1,
                    )  # fmt: skip
                    watched.note(session, row, [(session.now(), message)])

        count((1000, 1000), range(2, 6))
        count((20, 380), range(2))
        alarms = watched.Alarms()
        alarms.look(fleet.database)
        alarms.look(fleet.database)
        said = [record.getMessage() for record in caplog.records if "DRIFT" in record.getMessage()]
        # The target as a whole has not; the serial number names no cohort.
        assert said == ["tiny:1.0, site=berlin (2 devices): DRIFT of input/x/mean by 1.32"]
        count((4000, 3600), range(2))
        caplog.clear()
        alarms.look(fleet.database)
        assert "tiny:1.0, site=berlin: nothing drifts any more" in caplog.text
