"""Staged rollouts on the real service and database, in virtual time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.staged_fleet import StagedFleet, layouts

from kedge.fleet import shadows as all_shadows
from kedge.fleet.devices import desired_states
from kedge.fleet.results import Progress
from kedge.fleet.staged.policy import Approval, Busy, Late, OnAbort, Policy
from kedge.fleet.staged.times import Window
from kedge.page.stages import actions
from kedge_agent.update.desired_states import DesiredStates
from kedge_protocol import codec
from kedge_protocol.errors import ConfigError, FleetError
from kedge_protocol.trust import Role

WAVES = ("2", "50%", "100%")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return layouts(tmp_path_factory.mktemp("layouts"))


@pytest.fixture
def fleet(tmp_path: Path, published: dict[str, Path]) -> Iterator[StagedFleet]:
    with StagedFleet(tmp_path, published) as made:
        made.add(12, "rpi4")
        made.add(8, "rpi5")
        made.settle("1.0")
        yield made


def policy(**changed: object) -> Policy:
    known = {"waves": WAVES, "min_per_target": 2, "soak": 60.0, "progress_timeout": 120.0}
    return Policy(**(known | changed))  # type: ignore[arg-type]


def members(fleet: StagedFleet, wave: int) -> list[str]:
    return [one.device for one in fleet.status().devices if one.wave == wave]


def test_a_good_release_reaches_all_in_waves_and_each_device_is_told_once(fleet: StagedFleet) -> None:
    started = fleet.service.rollout_start("tiny:2.0", policy=policy()).rollout
    assert started.counts == {"waiting": 20}
    assert started.stage is not None
    assert [one.devices for one in started.stage.waves] == [4, 6, 10]
    assert {one.serving for one in started.devices} == {fleet.digest("1.0", "rpi4"), fleet.digest("1.0", "rpi5")}
    fleet.step(5)
    stage = fleet.stage()
    assert (stage.phase.value, stage.wave, stage.steps) == ("soaking", 1, {"serving": 4, "waiting": 16})
    assert fleet.serving("2.0") == set(members(fleet, 1))
    fleet.step(40)
    assert fleet.stage().wave == 1
    stage = fleet.until("done")
    assert stage.wave == 3
    assert fleet.serving("2.0") == set(fleet.devices)
    assert {len(device.told) for device in fleet.devices.values()} == {1}
    status = fleet.status()
    assert (status.state, status.done, status.counts) == ("active", True, {"done": 20})
    assert fleet.actions(status.id) == [
        "rollout.start",
        *("rollout.wave", "rollout.soak", "rollout.promote") * 3,
        "rollout.end",
    ]


def test_a_bad_release_stops_in_the_first_wave_and_is_taken_back(fleet: StagedFleet) -> None:
    fleet.fail("2.0", fleet.devices, "prove")
    number = fleet.service.rollout_start("tiny:2.0", policy=policy()).rollout.id
    stage = fleet.until("aborted", rollout=number)
    assert stage.wave == 1
    assert "golden" in stage.reason
    assert fleet.serving("1.0") == set(fleet.devices)
    reached = [device for device in fleet.devices.values() if device.told]
    assert len(reached) == 4
    assert {len(device.told) for device in reached} == {2}
    assert stage.steps == {"reverted": 4, "waiting": 16}
    revert = fleet.status(stage.reverted_by)
    assert (revert.kind, revert.done, revert.version) == ("revert", True, "1.0")
    status = fleet.status(number)
    assert (status.state, status.done) == ("aborted", False)
    entry = next(one for one in fleet.service.audit_log(subject=f"rollout {number}") if one.action == "rollout.abort")
    assert entry.actor == "controller"
    assert entry.evidence["gates"][0]["verdict"] == "fail"


def test_an_aborted_rollout_may_keep_what_it_reached(fleet: StagedFleet) -> None:
    fleet.fail("2.0", list(fleet.devices)[:9], "prove")
    fleet.service.rollout_start("tiny:2.0", policy=policy(on_abort=OnAbort.KEEP))
    stage = fleet.until("aborted")
    assert stage.reverted_by is None
    assert fleet.serving("2.0")
    # The operator may take it back later.
    fleet.service.rollout_revert(fleet.status().id)
    fleet.until("aborted")
    assert fleet.serving("1.0") == set(fleet.devices)


def test_pause_resume_promote_and_abort_by_a_person(fleet: StagedFleet) -> None:
    service = fleet.service
    number = service.rollout_start("tiny:2.0", policy=policy(soak=300.0)).rollout.id
    fleet.step(5)
    service.rollout_pause()
    fleet.step(1000, every=5)
    assert (fleet.stage().wave, fleet.stage().paused) == (1, True)
    with pytest.raises(FleetError, match="rollout 2: it is paused already"):
        service.rollout_pause()
    with pytest.raises(FleetError, match="paused"):
        service.rollout_promote()
    service.rollout_resume()
    fleet.step(10)
    assert fleet.stage().wave == 2
    service.rollout_promote()
    fleet.step(2)
    assert (fleet.stage().wave, len(fleet.serving("2.0"))) == (3, 20)
    service.rollout_abort(number, reason="smoke in the hall")
    fleet.until("aborted", rollout=number)
    assert fleet.serving("1.0") == set(fleet.devices)
    with pytest.raises(FleetError, match="aborted"):
        service.rollout_resume(number)
    actions = fleet.actions(number)
    assert [one for one in actions if one.split(".")[1] in ("pause", "resume", "abort")] == [
        "rollout.pause",
        "rollout.resume",
        "rollout.abort",
    ]


def test_a_rollout_waits_for_approval_and_for_its_window(fleet: StagedFleet) -> None:
    # The virtual time begins on a Friday at 8:00 UTC, 9:00 in Berlin.
    window = Window(hours="22:00-05:00", days=("fri",), timezone="Europe/Berlin")
    fleet.service.rollout_start("tiny:2.0", policy=policy(window=window, approval=Approval.FIRST))
    fleet.step(12 * 3600, every=600)
    assert (fleet.stage().phase.value, fleet.serving("2.0")) == ("running", set())
    assert fleet.stage().reason == "no device is told outside of its window, 22:00-05:00 fri Europe/Berlin"
    fleet.step(2 * 3600, every=600)
    assert len(fleet.serving("2.0")) == 4
    stage = fleet.until("holding")
    assert "approval" in stage.reason
    fleet.service.rollout_promote()
    fleet.until("done")
    assert fleet.serving("2.0") == set(fleet.devices)


def test_parallel_and_rate_limits_are_kept(fleet: StagedFleet) -> None:
    for device in fleet.devices.values():
        device.seconds = 30.0
    fleet.service.rollout_start("tiny:2.0", policy=policy(waves=("100%",), parallel=3))
    most = 0
    while fleet.stage().phase.value != "done":
        fleet.step(2, every=2)
        most = max(most, fleet.stage().steps.get("updating", 0))
    assert most == 3
    for device in fleet.devices.values():
        device.seconds = 0.0
    fleet.service.rollout_start("tiny:3.0", policy=policy(waves=("100%",), per_minute=6))
    begun = fleet.now
    while len(fleet.serving("3.0")) < 20:
        fleet.step(5, every=5)
        assert len(fleet.serving("3.0")) <= 6 * (1 + (fleet.now - begun) // 60)


def test_a_device_that_failed_by_chance_is_tried_again_and_one_that_refused_is_not(fleet: StagedFleet) -> None:
    fleet.fail("2.0", ["rpi4-0000"], "fetch", "ok")
    fleet.fail("2.0", ["rpi5-0000"], "prove", "ok")
    fleet.service.rollout_start("tiny:2.0", policy=policy(waves=("100%",), retries=2))
    assert fleet.until("incomplete", "done").phase.value == "incomplete"
    assert len(fleet.devices["rpi4-0000"].told) == 2
    assert len(fleet.devices["rpi5-0000"].told) == 1
    assert fleet.status().counts == {"done": 19, "failed": 1}
    fleet.service.rollout_retry()
    assert fleet.until("done").steps == {"serving": 20}
    assert fleet.status().done


def test_a_shadow_and_a_rotation_of_keys_are_no_new_try_of_what_failed(fleet: StagedFleet) -> None:
    fleet.fail("2.0", ["rpi5-0000"], "prove", "ok")
    fleet.service.rollout_start("tiny:2.0", policy=policy(waves=("100%",)))
    assert fleet.until("incomplete").phase.value == "incomplete"
    all_shadows.start(fleet.service, "tiny:3.0", {})
    fleet.step(5)
    fleet.service.key_rotate(Role.CONTROLLER)
    fleet.step(5)
    assert len(fleet.devices["rpi5-0000"].told) == 3
    assert fleet.status().counts == {"done": 19, "failed": 1}
    fleet.service.rollout_retry()
    assert fleet.until("done").steps == {"serving": 20}


def test_a_newer_rollout_supersedes_or_waits_by_rule(fleet: StagedFleet) -> None:
    service = fleet.service
    first = service.rollout_start("tiny:2.0", policy=policy(soak=600.0)).rollout.id
    fleet.step(5)
    queued = service.rollout_start("tiny:3.0", policy=policy(busy=Busy.QUEUE)).rollout.id
    fleet.step(20)
    stage = fleet.stage(queued)
    assert (stage.phase.value, stage.reason) == ("queued", f"rollout {first} has some of its devices")
    assert fleet.until("done", "superseded", rollout=first).wave == 3
    fleet.until("done", rollout=queued)
    assert fleet.serving("3.0") == set(fleet.devices)
    third = service.rollout_start("tiny:2.0", {}, policy=policy()).rollout.id
    fleet.step(5)
    service.rollout_start("tiny:1.0")
    assert fleet.stage(third).phase.value == "superseded"
    assert service.rollout_status(third).state == "superseded"
    fleet.step(20)
    assert fleet.serving("1.0") == set(fleet.devices)


def test_late_devices_are_taken_in_or_not(fleet: StagedFleet) -> None:
    service = fleet.service
    number = service.rollout_start("tiny:2.0", policy=policy(late=Late.IN, select="target=rpi4")).rollout.id
    fleet.step(5)
    fleet.add(3, "rpi4", prefix="late")
    fleet.step(20)
    assert not [name for name in fleet.serving("2.0") if name.startswith("late")]
    fleet.until("done")
    fleet.step(20)
    assert len(fleet.serving("2.0")) == 15
    fleet.add(2, "rpi4", prefix="later")
    fleet.add(2, "rpi5", prefix="other")
    fleet.step(30)
    assert len(fleet.serving("2.0")) == 17
    assert fleet.stage(number).waves[-1].devices == 5
    service.rollout_start("tiny:3.0", policy=policy(select="target=rpi4"))
    fleet.until("done")
    fleet.add(1, "rpi4", prefix="last")
    fleet.step(60)
    assert fleet.devices["last-0000"].told == []


def test_what_does_not_fit_is_refused_before_anything_starts(fleet: StagedFleet) -> None:
    service = fleet.service
    before = len(service.rollouts())
    for wrong, words in (
        ({"waves": ("50%", "10%", "100%")}, "the waves must grow, and 10% follows 50%"),
        ({"waves": ("10%",)}, "must reach 100%"),
        ({"waves": ("some",)}, "neither a share"),
        ({"select": "site=="}, "cannot be read"),
        ({"window": Window(hours="25:00-26:00")}, "hours"),
        ({"window": Window(timezone="Nowhere/There")}, "time zone"),
        ({"soak": -1.0}, "soak = -1 is out of range"),
        ({"deadline": 60.0}, "shorter than progress_timeout"),
    ):
        with pytest.raises(ConfigError, match=words):
            service.rollout_start("tiny:2.0", policy=policy(**wrong))
    with pytest.raises(FleetError, match=r"no device has a label 'sit'"):
        service.rollout_start("tiny:2.0", policy=policy(select="sit=berlin"))
    with pytest.raises(FleetError, match="no device 'nobody'"):
        service.rollout_start("tiny:2.0", policy=policy(devices=("nobody",)))
    with pytest.raises(FleetError, match="no release"):
        service.rollout_start("tiny:9", policy=policy())
    assert len(service.rollouts()) == before


@pytest.mark.parametrize(("how", "then"), [(OnAbort.KEEP, "keep the new bundle"), (OnAbort.REVERT, "go back")])
def test_the_buttons_of_the_page_do_what_they_say(fleet: StagedFleet, how: OnAbort, then: str) -> None:
    number = fleet.service.rollout_start("tiny:2.0", policy=policy(on_abort=how)).rollout.id
    fleet.step(5)
    shown = {one.verb: one for one in actions(number, fleet.stage())}
    assert shown.keys() == {"pause", "promote", "abort"}
    assert then in shown["abort"].question
    (left,) = actions(number, fleet.until("done"))
    assert (left.verb, "go back" in left.question) == ("revert", True)
    fleet.service.rollout_revert(number)
    fleet.step(60)
    assert fleet.serving("1.0") == set(fleet.devices)


@pytest.mark.parametrize("soak", [0.0, 60.0, 7 * 86400.0, 8 * 86400.0, 366 * 86400.0])
def test_whatever_the_policy_allows_an_agent_takes(fleet: StagedFleet, soak: float) -> None:
    fleet.service.rollout_start(
        "tiny:2.0", policy=policy(soak=soak, max_soak=soak, shadow=1.0, shadow_memory_mib=10**6)
    )
    fleet.step(5)
    fleet.service.rollout_start("tiny:3.0", policy=policy(soak=soak, max_soak=soak))
    fleet.step(5)
    with fleet.service.database.read() as session:
        devices = session.rows("SELECT id, desired_version FROM device")
        told = desired_states(
            session, {row["id"]: row["desired_version"] for row in devices}, [row["id"] for row in devices]
        )
    assert any(state.soaks for state in told.values()) == (soak > 0)
    for state in told.values():
        agent = DesiredStates("")
        assert agent.take(codec.encode(state)), agent.problem


def test_a_dry_run_tells_waves_bytes_and_shortfalls_and_does_nothing(fleet: StagedFleet) -> None:
    found = fleet.service.rollout_plan("tiny:2.0", policy=policy(min_per_target=5))
    assert (found.devices, len(found.waves)) == (20, 3)
    assert {target: len(names) for target, names in found.waves[0].devices.items()} == {"rpi4": 5, "rpi5": 5}
    assert found.bytes == sum(wave.bytes for wave in found.waves) > 0
    assert [(one.wave, one.target, one.devices) for one in found.shortfalls] == [
        (2, "rpi5", 3),
        (3, "rpi4", 2),
        (3, "rpi5", 0),
    ]
    assert fleet.service.rollout_plan("tiny:1.0", policy=policy()).bytes == 0
    assert len(fleet.service.rollouts()) == 1
    started = fleet.service.rollout_start("tiny:2.0", policy=policy(min_per_target=5)).rollout
    planned = {name: wave.number for wave in found.waves for names in wave.devices.values() for name in names}
    assert {one.device: one.wave for one in started.devices} == planned
    assert Progress.WAITING.value in started.counts


def shadows(fleet: StagedFleet) -> set[str]:
    query = "SELECT name, digest, target FROM desired_shadow JOIN device ON device.id = device_id"
    with fleet.service.database.read() as session:
        rows = session.rows(query)
    assert all(row["digest"] == fleet.digest("2.0", row["target"]) for row in rows)
    return {row["name"] for row in rows}


def test_the_first_wave_runs_the_new_bundle_as_a_shadow_before_it_is_switched(fleet: StagedFleet) -> None:
    number = fleet.service.rollout_start("tiny:2.0", policy=policy(shadow=0.1, soak=30.0)).rollout.id
    fleet.step(5)
    assert (fleet.stage().phase.value, fleet.stage().wave) == ("shadowing", 1)
    first = set(members(fleet, 1))
    assert shadows(fleet) == first
    assert fleet.serving("1.0") == set(fleet.devices)
    # No device has compared anything: it is held, and a person decides.
    assert "no shadow has compared anything" in fleet.until("holding").reason
    fleet.service.rollout_promote()
    fleet.step(2)
    assert (fleet.serving("2.0"), shadows(fleet)) == (first, set())
    fleet.until("done")
    assert "rollout.shadow" in fleet.actions(number)


@pytest.mark.parametrize("disagrees", [0, 10])
def test_shadows_that_disagree_stop_a_rollout_before_any_device_is_switched(fleet: StagedFleet, disagrees: int) -> None:
    for device in fleet.devices.values():
        device.disagrees = disagrees
    number = fleet.service.rollout_start("tiny:2.0", policy=policy(shadow=0.1, soak=60.0)).rollout.id
    stage = fleet.until("aborted", "done")
    if disagrees:
        assert stage.phase.value == "aborted"
        assert "agreement" in stage.reason
        assert fleet.serving("2.0") == set()
        assert fleet.serving("1.0") == set(fleet.devices)
        assert stage.reverted_by is None
    else:
        assert fleet.serving("2.0") == set(fleet.devices)
    fleet.step(2)
    assert shadows(fleet) == set()
    assert "rollout.shadow" in fleet.actions(number)


def test_an_abort_ends_the_shadows_and_has_switched_nothing(fleet: StagedFleet) -> None:
    fleet.service.rollout_start("tiny:2.0", policy=policy(shadow=0.1))
    fleet.step(5)
    assert shadows(fleet)
    fleet.service.rollout_abort()
    fleet.step(2)
    assert (fleet.stage().phase.value, shadows(fleet)) == ("aborted", set())
    assert fleet.serving("1.0") == set(fleet.devices)


def test_a_release_that_a_rollout_needs_cannot_be_removed(fleet: StagedFleet) -> None:
    number = fleet.service.rollout_start("tiny:2.0", policy=policy()).rollout.id
    with pytest.raises(FleetError, match=f"rollout {number} is to bring it to further devices"):
        fleet.service.release_remove("tiny:2.0")
    fleet.service.rollout_start("tiny:3.0", {}, policy=policy(waves=("100%",)))
    fleet.step(5)
    with pytest.raises(FleetError, match=r"rollout 3 may have to take devices back to it"):
        fleet.service.release_remove("tiny:1.0")
    fleet.until("done")
    assert fleet.service.release_remove("tiny:1.0").blobs_removed


def test_a_device_that_is_removed_or_taken_over_is_not_waited_for(fleet: StagedFleet) -> None:
    for device in fleet.devices.values():
        device.deaf = device.target == "rpi5"
    number = fleet.service.rollout_start("tiny:2.0", policy=policy(waves=("100%",), soak=10.0)).rollout.id
    fleet.step(5)
    for name in ("rpi5-0000", "rpi5-0001"):
        fleet.service.device_remove(name)
        del fleet.devices[name]
    fleet.service.rollout_start("tiny:3.0", policy=policy(select="target=rpi5", waves=("100%",)))
    assert fleet.until("done", rollout=number).steps == {"gone": 6, "serving": 12}


def test_a_rollout_whose_devices_are_all_removed_ends(fleet: StagedFleet) -> None:
    number = fleet.service.rollout_start("tiny:2.0", policy=policy(select="target=rpi5")).rollout.id
    fleet.step(2)
    for name in [name for name, device in fleet.devices.items() if device.target == "rpi5"]:
        fleet.service.device_remove(name)
        del fleet.devices[name]
    fleet.step(5)
    assert fleet.stage(number).phase.value == "superseded"
