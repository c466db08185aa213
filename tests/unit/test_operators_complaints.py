"""What operators complain about in other systems (field notes, by number), as far as it concerns rollouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.staged_fleet import StagedFleet, layouts

from kedge.fleet.controller import HELD_REMINDERS, REMIND_SECONDS, Controller
from kedge.fleet.results import Progress
from kedge.fleet.rollout_status import DeviceFilter
from kedge.fleet.staged.gates import GATES, Gates
from kedge.fleet.staged.policy import Policy
from kedge.simulator import scenario as scenarios
from kedge.simulator.virtual import simulate
from kedge_protocol import codec, topics
from kedge_protocol.broker import parse_broker
from kedge_protocol.errors import FleetError
from kedge_protocol.messages import Status

POLICY = Policy(waves=("50%", "100%"), min_per_target=2, soak=30.0, progress_timeout=60.0, retries=2, retry_after=10.0)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return layouts(tmp_path_factory.mktemp("layouts"), ("rpi4",))


@pytest.fixture
def fleet(tmp_path: Path, published: dict[str, Path]) -> Iterator[StagedFleet]:
    with StagedFleet(tmp_path, published) as made:
        made.add(12, "rpi4")
        made.settle("1.0")
        yield made


def test_complaint_1_a_rollout_is_not_done_while_a_device_runs_the_old_image(fleet: StagedFleet) -> None:
    fleet.devices["rpi4-0001"].deaf = True
    fleet.service.rollout_start("tiny:2.0", policy=POLICY)
    fleet.until("incomplete", "done")
    status = fleet.status()
    assert not status.done
    assert status.stage is not None
    assert status.stage.phase.value == "incomplete"
    assert status.counts == {"done": 11, "silent": 1}
    # It comes back, and only what it says then makes the rollout done.
    fleet.devices["rpi4-0001"].deaf = False
    fleet.step(60, every=10)
    assert fleet.serving("2.0") == set(fleet.devices)
    assert fleet.status().done


def test_complaint_2_a_dead_device_is_not_in_progress_for_ever(fleet: StagedFleet) -> None:
    dead = fleet.devices["rpi4-0001"]
    dead.deaf = True
    fleet.service.rollout_start("tiny:2.0", policy=POLICY)
    fleet.until("incomplete")
    shown = fleet.service.rollout_status(shown=DeviceFilter(progress=frozenset({Progress.SILENT})))
    assert [one.device for one in shown.devices] == [dead.name]
    assert "did not answer in time" in shown.devices[0].detail
    entry = next(one for one in fleet.service.audit_log() if one.action == "rollout.silent")
    assert entry.evidence["devices"] == [dead.name]


def test_complaint_2_a_device_that_reports_and_never_ends_is_not_in_progress_for_ever(fleet: StagedFleet) -> None:
    fleet.devices["rpi4-0001"].seconds = 1e9
    policy = Policy(waves=("100%",), soak=30.0, progress_timeout=60.0, deadline=600.0)
    fleet.service.rollout_start("tiny:2.0", policy=policy)
    fleet.step(300, every=10)
    assert fleet.status().counts == {"done": 11, "fetching": 1}
    fleet.until("incomplete")
    assert fleet.status().counts == {"done": 11, "silent": 1}


@pytest.mark.parametrize(("silent", "phase"), [(1, "incomplete"), (2, "aborted")])
def test_complaint_2_a_silent_device_of_three_holds_no_rollout_until_somebody_comes(
    fleet: StagedFleet, silent: int, phase: str
) -> None:
    three = tuple(fleet.devices)[:3]
    for name in three[:silent]:
        fleet.devices[name].deaf = True
    policy = Policy(
        devices=three, waves=("100%",), soak=30.0, max_soak=120.0, progress_timeout=60.0, deadline=600.0,
        gates=Gates(off=tuple(name for name in GATES if name not in ("silence", "failures", "golden"))),
    )  # fmt: skip
    fleet.service.rollout_start("tiny:2.0", policy=policy)
    fleet.until(phase)
    entries = [one.action for one in fleet.service.audit_log()]
    assert "rollout.hold" not in entries
    if phase == "aborted":
        assert "more than 50%" in fleet.stage().reason


def test_complaint_4_retries_end_and_can_be_cancelled(fleet: StagedFleet) -> None:
    fleet.fail("2.0", ["rpi4-0001"], "fetch")
    fleet.service.rollout_start("tiny:2.0", policy=POLICY)
    fleet.until("incomplete")
    fleet.step(600, every=10)
    assert len(fleet.devices["rpi4-0001"].told) == 1 + POLICY.retries
    fleet.fail("3.0", ["rpi4-0001"], "fetch")
    fleet.service.rollout_start("tiny:3.0", policy=POLICY)
    fleet.step(3)
    fleet.service.rollout_abort()
    fleet.until("aborted")
    told = len(fleet.devices["rpi4-0001"].told)
    fleet.step(600, every=10)
    assert len(fleet.devices["rpi4-0001"].told) == told


def test_complaint_6_a_stuck_rollout_blocks_no_later_one(fleet: StagedFleet) -> None:
    fleet.add(4, "rpi4", prefix="other")
    half = [name for name in fleet.devices if name.startswith("rpi4")]
    for name in half:
        fleet.devices[name].deaf = True
    stuck = fleet.service.rollout_start("tiny:2.0", policy=Policy(devices=tuple(half), progress_timeout=5000.0))
    fleet.step(10)
    others = tuple(name for name in fleet.devices if name.startswith("other"))
    fleet.service.rollout_start("tiny:2.0", policy=Policy(devices=others, soak=10.0))
    assert fleet.until("done").steps == {"serving": 4}
    # On the same devices too: the newer one has them at once.
    fleet.service.rollout_start("tiny:3.0")
    for name in half:
        fleet.devices[name].deaf = False
    fleet.step(5)
    assert fleet.serving("3.0") == set(fleet.devices)
    assert fleet.status(stuck.rollout.id).state == "superseded"


def test_complaint_7_a_final_status_that_nobody_heard_is_not_lost(fleet: StagedFleet) -> None:
    fleet.service.rollout_start("tiny:2.0", policy=POLICY)
    fleet.step(1)
    # The devices are done; the controller dies before it has heard of it, and comes back much later.
    for device in fleet.devices.values():
        if device.wanted is not None and device.told:
            device.serving = device.wanted
    fleet.now += 7200
    fleet.restart()
    fleet.listening_since = fleet.now
    fleet.step(5)
    assert "silent" not in fleet.stage().steps
    assert fleet.until("done").steps == {"serving": 12}


def test_complaint_8_a_duplicate_order_runs_nothing_twice(fleet: StagedFleet) -> None:
    fleet.service.rollout_start("tiny:2.0", policy=POLICY)
    # Two controllers' worth of rounds, each with an empty memory, on the same facts.
    for _ in range(40):
        fleet.step(5, every=5)
        fleet.restart()
        fleet.tick()
    assert fleet.stage().phase.value == "done"
    assert {len(device.told) for device in fleet.devices.values()} == {1}
    with pytest.raises(FleetError, match="it is done"):
        fleet.service.rollout_promote()


def test_complaint_14_a_rate_limit_holds_after_a_pause_and_a_restart(fleet: StagedFleet) -> None:
    fleet.service.rollout_start("tiny:2.0", policy=Policy(waves=("100%",), per_minute=2, soak=10.0))
    fleet.step(30)
    assert len(fleet.serving("2.0")) == 2
    fleet.service.rollout_pause()
    fleet.step(20)
    fleet.restart()
    fleet.service.rollout_resume()
    fleet.step(5)
    assert len(fleet.serving("2.0")) == 2
    fleet.step(60)
    assert len(fleet.serving("2.0")) == 4


def test_complaint_9_devices_whose_clocks_stand_in_1970_take_signed_releases() -> None:
    document = {"fleet": [{"target": "rpi4", "count": 6}], "before": 60, "faults": {"clock_skew": 3.6e9, "loss": 0.05}}
    found = simulate(scenarios.parse(document))
    assert (found.state, found.reached) == ("done", 6)


class _Channel:
    """The controller's end of a broker that acknowledges what it is given; what it lets through is the test's."""

    connected, session = True, 1

    def __init__(self, broker: Any, *_: Any, on_connected: Any, on_message: Any, **__: Any) -> None:
        self.broker = broker
        self.up: Callable[[int], None] = on_connected
        self.arrive: Callable[[str, bytes, bool], None] = on_message
        self.published: list[tuple[str, bool]] = []

    def start(self) -> None:
        self.up(1)

    def stop(self, timeout: float = 3.0) -> None:
        pass

    def publish(self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False) -> bool:
        self.published.append((topic, retain))
        return True

    def wait_sent(self, below: int, timeout: float) -> bool:
        return True


class _Served:
    """A fleet's controller on such a broker."""

    def __init__(self, fleet: StagedFleet) -> None:
        self.steady = 0.0
        made: list[_Channel] = []

        def connect(*given: Any, **named: Any) -> Any:
            made.append(_Channel(*given, **named))
            return made[0]

        self.controller = Controller(
            fleet.service.state,
            parse_broker("mqtt://127.0.0.1:1883"),
            clock=lambda: fleet.now + self.steady,
            steady=lambda: self.steady,
            connect=connect,
            block_thread=False,
        )
        self.channel = made[0]
        self.controller.start()
        for name in fleet.devices:
            status = codec.encode(Status(online=True, boot_id=f"boot-{name}", session=1))
            self.channel.arrive(topics.status(name), status, True)

    def wait(self, seconds: float) -> None:
        self.steady += seconds
        self.controller.tick()


def test_complaint_12_a_desired_state_that_the_broker_acknowledged_and_dropped_is_sent_again(
    fleet: StagedFleet,
) -> None:
    fleet.service.rollout_start("tiny:2.0")
    served = _Served(fleet)
    with served.controller:
        name = "rpi4-0001"

        def told() -> int:
            return served.channel.published.count((topics.desired(name), True))

        served.wait(1.0)
        assert told() == 1
        served.wait(REMIND_SECONDS / 2)
        assert told() == 1
        for number in range(2, 5):
            served.wait(REMIND_SECONDS)
            assert told() == number
        # Once the device answers, it is left alone.
        device = fleet.devices[name]
        with fleet.service.database.read() as session:
            version = session.value("SELECT desired_version FROM device WHERE name = ?", (name,))
        answer = device.answer(fleet.now)
        assert answer is not None
        heard = codec.encode({**codec.unstructure(answer), "desired_version": version, "boot_id": f"boot-{name}"})
        served.channel.arrive(topics.reported(name), heard, False)
        served.wait(1.0)
        served.wait(REMIND_SECONDS)
        served.wait(REMIND_SECONDS)
        assert told() == 4


def test_a_device_that_somebody_keeps_on_its_old_state_is_named_in_the_log(
    fleet: StagedFleet, caplog: pytest.LogCaptureFixture
) -> None:
    fleet.service.rollout_start("tiny:2.0")
    served = _Served(fleet)
    with served.controller:
        for _ in range(HELD_REMINDERS - 1):
            served.wait(REMIND_SECONDS)
        assert "has not taken its desired state" not in caplog.text
        for _ in range(5):
            served.wait(REMIND_SECONDS)
    said = [record.getMessage() for record in caplog.records if "has not taken its desired" in record.getMessage()]
    assert sorted(line.partition(" ")[0] for line in said) == sorted(fleet.devices)


def test_complaint_13_no_command_is_retained_and_an_old_one_is_not_sent(fleet: StagedFleet) -> None:
    fleet.service.device_report("rpi4-0001")
    served = _Served(fleet)
    with served.controller:
        for _ in range(5):
            served.wait(10.0)
        commands = [one for one in served.channel.published if "/cmd/" in one[0]]
        assert len(commands) == 1
        assert not commands[0][1]
        fleet.service.device_report("rpi4-0002")
        # Nobody was there to send it.
        served.steady += 3600.0
        served.wait(1.0)
        assert len([one for one in served.channel.published if "/cmd/" in one[0]]) == 1
