"""The evidence of a rollout is collected from what devices sent: the new bundle beside the old one, by target."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tests.unit.test_call_figures import NEW, OLD, message

from kedge.fleet import call_figures, drift
from kedge.fleet.database import Database
from kedge.fleet.staged import evidence
from kedge.fleet.staged.cohorts import CohortEvidence
from kedge.fleet.staged.evidence import CONTROL, MEASURED
from kedge.fleet.staged.gates import Gates, Verdict, judge
from kedge.fleet.staged.readings import Readings
from kedge.fleet.staged.slopes import slope
from kedge_protocol.drift import Kind, Statistic, Stream
from kedge_protocol.messages import ShadowTelemetry, Telemetry

SWITCH = 10_000.0


class Rollout:
    """A rollout of devices that are put at a step; telemetry comes each twenty seconds."""

    def __init__(self, folder: Path) -> None:
        self.database = Database(folder)
        self.devices = 0
        with self.database.write() as session:
            session.run(
                "INSERT INTO rollout (id, model, version, kind, state, started_at, selected)"
                " VALUES (1, 'tiny', '2.0', 'start', 'active', 0, '{}')"
            )

    def add(self, count: int, step: str, *, target: str = "rpi4", stage: str = "", wave: int = 1) -> list[int]:
        """Add devices; those that were told have their part."""
        first = self.devices + 1
        self.devices += count
        numbers = list(range(first, self.devices + 1))
        with self.database.write() as session:
            for number in numbers:
                session.run("INSERT INTO device VALUES (?, ?, ?, '{}', 0, 1, 1, 0)", (number, f"d{number:04}", target))
                session.run(
                    "INSERT INTO rollout_member VALUES (1, ?, ?, ?, ?, 0, 0, '', 0, ?)",
                    (number, target, wave, step, stage),
                )
                session.run(
                    "INSERT INTO desired_model (device_id, model, digest, size) VALUES (?, 'tiny', ?, 1)",
                    (number, OLD if step == "waiting" else NEW),
                )
                if step != "waiting":
                    session.run("INSERT INTO rollout_device VALUES (1, ?, ?, ?, 1, 1, 0, NULL)", (number, NEW, OLD))
        return numbers

    def tell(self, devices: list[int], start: float, minutes: float, *messages: Telemetry) -> None:
        """Let devices send, one message after another, over and over."""
        with self.database.write() as session:
            for device in devices:
                times = [start + 20.0 * step for step in range(int(3 * minutes) + 1)]
                told = [(at, messages[step % len(messages)]) for step, at in enumerate(times)]
                call_figures.note(session, {device: told})

    def collect(self, now: float = 1e9) -> dict[str, CohortEvidence]:
        """The evidence by target."""
        with self.database.read() as session:
            return {one.target: one for one in evidence.collect(session, 1, now=now)}


@pytest.fixture
def rollout(tmp_path: Path) -> Rollout:
    return Rollout(tmp_path)


def test_devices_are_counted_by_where_they_stand(rollout: Rollout) -> None:
    rollout.add(3, "serving")
    rollout.add(2, "failed", stage="prove")
    rollout.add(1, "failed", stage="fetch")
    rollout.add(1, "silent")
    rollout.add(1, "updating")
    rollout.add(4, "waiting")
    rollout.add(2, "gone")
    rollout.add(3, "waiting", target="rpi5")
    found = rollout.collect()
    one = found["rpi4"]
    assert (one.devices, one.serving, one.failed, one.proof_failed, one.silent) == (8, 3, 3, 2, 1)
    assert (one.control_devices, one.control_silent) == (4, 4)
    assert (found["rpi5"].devices, found["rpi5"].control_devices) == (0, 3)


def test_what_devices_attest_is_counted_and_none_is_told_of_agents_that_do_not_say(rollout: Rollout) -> None:
    numbers = rollout.add(4, "serving")
    assert rollout.collect()["rpi4"].served_by_calls is None
    with rollout.database.write() as session:
        for number, (calls, golden) in zip(numbers, [(7, 0), (0, 8), (0, 0), (None, None)], strict=True):
            session.run(
                "INSERT INTO reported_model (device_id, model, state, digest, proved, blocks_done, blocks_total,"
                " bytes_received, served_calls, served_golden) VALUES (?, 'tiny', 'serving', ?, 1, 0, 0, 0, ?, ?)",
                (number, NEW, calls, golden),
            )
    found = rollout.collect()["rpi4"]
    assert (found.served_by_calls, found.served_by_golden) == (1, 1)


def test_the_new_bundle_is_set_beside_the_old_one_on_the_same_devices_and_the_control(rollout: Rollout) -> None:
    reached, waiting = rollout.add(5, "serving"), rollout.add(3, "waiting")
    rollout.tell([*reached, *waiting], SWITCH - 3600, 60, message(OLD, errors=1))
    rollout.tell(reached, SWITCH, 20, message(NEW, errors=10))
    found = rollout.collect()["rpi4"]
    assert [device.device for device in found.new.devices] == ["d0001", "d0002", "d0003", "d0004", "d0005"]
    assert len(found.old.devices) == 8
    assert found.new.error_rate == pytest.approx(10 / 60)
    assert found.old.error_rate == pytest.approx(1 / 51)
    assert found.new.latency_ms("p99") == pytest.approx(40.0)
    assert [one.new for one in found.temperature_c] == pytest.approx([50.0] * 5)
    gate = {one.gate: one for one in judge(Gates(), [found], soaked=False)}
    assert gate["error_rate"].verdict is Verdict.FAIL
    assert gate["p99_ratio"].verdict is Verdict.PASS


def test_calls_of_an_earlier_try_of_the_same_bundle_do_not_count(rollout: Rollout) -> None:
    reached = rollout.add(3, "serving")
    rollout.tell(reached, SWITCH - 9000, 30, message(NEW, errors=40))
    rollout.tell(reached, SWITCH - 3600, 60, message(OLD))
    rollout.tell(reached, SWITCH, 10, message(NEW))
    assert rollout.collect()["rpi4"].new.error_rate == pytest.approx(1 / 51)


def test_between_two_looks_only_what_has_changed_is_read_again(
    rollout: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, waiting = rollout.add(5, "serving"), rollout.add(3, "waiting")
    rollout.tell([*reached, *waiting], SWITCH - 3600, 60, message(OLD))
    rollout.tell(reached, SWITCH, 20, message(NEW, memory=30_000_000))
    read: list[float] = []
    decode, readings = call_figures.decode, Readings()

    def counted(since: float, until: float, document: bytes) -> call_figures.Figures:
        read.append(since)
        return decode(since, until, document)

    monkeypatch.setattr(call_figures, "decode", counted)

    def look() -> tuple[CohortEvidence, ...]:
        read.clear()
        with rollout.database.read() as session:
            return evidence.collect(session, 1, now=1e9, readings=readings)

    first = look()
    assert len(read) == 13
    with rollout.database.write() as session:
        documents = [tuple(row) for row in session.rows("SELECT document, device_id, digest FROM call_figures")]
        session.run("UPDATE call_figures SET document = X'00'")
    assert look() == first, "documents of the same edition are not even fetched"
    assert not read
    with rollout.database.write() as session:
        session.run_many("UPDATE call_figures SET document = ? WHERE device_id = ? AND digest = ?", documents)
    rollout.tell(reached[:2], SWITCH + 1300, 5, message(NEW, errors=10))
    assert look() == tuple(rollout.collect().values()) != first
    assert len(read) == 2 + 13, "two rows, and all for the look without a memory"


def test_a_leak_is_a_slope_after_the_warm_up(rollout: Rollout) -> None:
    reached = rollout.add(5, "serving")
    growing = [message(NEW, memory=20_000_000 + 1_000_000 * minute) for minute in range(30)]
    with rollout.database.write() as session:
        for device in reached:
            told = [(SWITCH + 60.0 * minute, one) for minute, one in enumerate(growing)]
            call_figures.note(session, {device: told})
    found = rollout.collect()["rpi4"]
    assert [one.new for one in found.memory_slope] == pytest.approx([1e6] * 5, rel=0.01)
    gate = {one.gate: one for one in judge(Gates(), [found], soaked=False)}
    assert gate["memory_per_minute"].verdict is Verdict.FAIL


def test_memory_that_is_measured_seldom_makes_the_wave_wait_for_enough_of_it(rollout: Rollout) -> None:
    reached = rollout.add(5, "serving")
    told = [(SWITCH + 300.0 * step, message(NEW, memory=20_000_000 + 5_000_000 * step)) for step in range(6)]
    verdicts = []
    for step in range(len(told)):
        with rollout.database.write() as session:
            call_figures.note(session, {device: [told[step]] for device in reached})
        found = {one.gate: one for one in judge(Gates(), tuple(rollout.collect().values()), soaked=True)}
        verdicts.append(found["memory_per_minute"].verdict)
    assert verdicts == [Verdict.UNDECIDED] * 4 + [Verdict.FAIL] * 2


def test_without_any_telemetry_there_is_nothing_to_judge(rollout: Rollout) -> None:
    rollout.add(5, "serving")
    found = rollout.collect()["rpi4"]
    assert (found.new.inferences, found.old.inferences) == (0, 0)
    assert Verdict.FAIL not in {one.verdict for one in judge(Gates(), [found], soaked=True)}


def test_the_figures_that_are_read_do_not_grow_with_the_fleet(rollout: Rollout) -> None:
    reached = rollout.add(MEASURED + 20, "serving")
    waiting = rollout.add(CONTROL + 20, "waiting", wave=2)
    rollout.tell([*reached, *waiting], SWITCH - 600, 2, message(OLD))
    rollout.tell(reached, SWITCH, 2, message(NEW))
    found = rollout.collect()["rpi4"]
    assert found.devices == MEASURED + 20
    assert len(found.new.devices) == MEASURED
    assert len(found.old.devices) == MEASURED + CONTROL
    rollout.tell(rollout.add(MEASURED, "serving", wave=2), SWITCH, 2, message(NEW))
    measured = [device.device for device in rollout.collect()["rpi4"].new.devices]
    assert len(measured) == MEASURED, "as many of each wave"
    assert sum(name < f"d{MEASURED + 20:04}" for name in measured) == MEASURED // 2


def test_figures_that_begin_after_now_are_left_out(rollout: Rollout) -> None:
    reached = rollout.add(2, "serving")
    rollout.tell(reached, SWITCH, 5, message(NEW))
    assert rollout.collect(SWITCH - 1)["rpi4"].new.devices == ()


STREAMS = [
    Stream(kind=kind, tensor="x", statistic=Statistic.MEAN, edges=(0.0, 1.0, 2.0), counts=(100, 400, 400, 100))
    for kind in (Kind.INPUT, Kind.OUTPUT)
]
USUAL, MOVED = (10, 40, 40, 10), (40, 40, 10, 10)


def sketched(digest: str, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Telemetry:
    return message(digest, drift={"input/x/mean": inputs, "output/x/mean": outputs})


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ((USUAL, USUAL), (USUAL, MOVED), Verdict.FAIL),
        ((USUAL, USUAL), (USUAL, USUAL), Verdict.PASS),
        # The world's doing: the samples themselves have shifted, or the old bundle's outputs were as far off.
        ((USUAL, USUAL), (MOVED, MOVED), Verdict.PASS),
        ((USUAL, MOVED), (USUAL, MOVED), Verdict.PASS),
    ],
)
def test_only_what_drifts_further_with_the_new_bundle_is_held_against_it(
    rollout: Rollout, before: tuple[tuple[int, ...], ...], after: tuple[tuple[int, ...], ...], verdict: Verdict
) -> None:
    with rollout.database.write() as session:
        for number, digest in enumerate((OLD, NEW), 1):
            session.run("INSERT INTO release VALUES (?, 'tiny', ?, 'sha256:r', 1.0, NULL)", (number, f"{number}.0"))
            session.run(
                "INSERT INTO bundle (release_id, target, digest, size, backend, precision, drift)"
                " VALUES (?, 'rpi4', ?, 1, 'b', 'int8', ?)",
                (number, digest, drift.document(STREAMS)),
            )
    reached = rollout.add(5, "serving")
    rollout.tell(reached, SWITCH - 3600, 20, sketched(OLD, *before))
    rollout.tell(reached, SWITCH, 20, sketched(NEW, *after))
    found = {one.gate: one for one in judge(Gates(), tuple(rollout.collect().values()), soaked=False)}["drift"]
    assert found.verdict is verdict, found
    assert "inputs" in found.detail


def shadowed(agreed: int, classes: dict[str, tuple[int, ...]] | None = None, digest: str = NEW) -> Telemetry:
    told = ShadowTelemetry(digest=digest, compared=100, agreed=agreed, classes=classes or {}, confidence_shift=-2.0)
    return message(OLD, shadow=told)


def publish(rollout: Rollout) -> None:
    with rollout.database.write() as session:
        session.run("INSERT INTO release VALUES (2, 'tiny', '2.0', 'sha256:r', 1.0, NULL)")
        session.run(
            "INSERT INTO bundle (release_id, target, digest, size, backend, precision)"
            " VALUES (2, 'rpi4', ?, 1, 'b', 'int8')",
            (NEW,),
        )


@pytest.mark.parametrize(("agreed", "verdict"), [(99, Verdict.PASS), (90, Verdict.FAIL)])
def test_a_shadow_is_judged_by_its_agreement_on_devices_that_serve_the_old_bundle(
    rollout: Rollout, agreed: int, verdict: Verdict
) -> None:
    publish(rollout)
    reached = rollout.add(5, "updating")
    rollout.tell(reached, SWITCH - 600, 10, shadowed(agreed, {"cat": (10, agreed - 90), "dog": (90, 90)}))
    found = rollout.collect()["rpi4"]
    assert found.shadow is not None
    assert found.shadow.agreement == pytest.approx(agreed / 100)
    assert found.shadow.devices[0].confidence_shift == pytest.approx(-0.02, rel=0.2)
    gate = {one.gate: one for one in judge(Gates(), [found], soaked=False)}["agreement"]
    assert gate.verdict is verdict, gate
    assert f"least class cat ({10 * (agreed - 90)}%)" in gate.detail


@pytest.mark.parametrize(("compared", "errors"), [(0, 50), (90, 10)])
def test_a_shadow_that_fails_on_inputs_does_not_agree(rollout: Rollout, compared: int, errors: int) -> None:
    publish(rollout)
    reached = rollout.add(5, "updating")
    told = ShadowTelemetry(digest=NEW, compared=compared, agreed=compared, confidence_shift=-0.9, errors=errors)
    rollout.tell(reached, SWITCH - 600, 10, message(OLD, shadow=told))
    found = rollout.collect()["rpi4"]
    assert found.shadow is not None
    assert found.shadow.agreement == pytest.approx(compared / (compared + errors))
    assert found.shadow.devices[0].confidence_shift == (pytest.approx(-0.01) if compared else None)
    gate = {one.gate: one for one in judge(Gates(), [found], soaked=False)}["agreement"]
    assert gate.verdict is Verdict.FAIL, gate


def test_without_an_answer_of_the_shadow_that_is_asked_for_the_gate_waits(rollout: Rollout) -> None:
    publish(rollout)
    reached = rollout.add(1, "updating")
    assert rollout.collect()["rpi4"].shadow is None
    with rollout.database.write() as session:
        session.run("INSERT INTO desired_shadow VALUES (?, 'tiny', ?, 1, 0.1, 1)", (reached[0], NEW))
    found = rollout.collect()["rpi4"]
    gate = {one.gate: one for one in judge(Gates(), [found], soaked=True)}["agreement"]
    assert (gate.verdict, gate.figure) == (Verdict.UNDECIDED, None)


def test_what_another_shadow_answered_does_not_count(rollout: Rollout) -> None:
    publish(rollout)
    reached = rollout.add(2, "updating")
    rollout.tell(reached, SWITCH - 600, 10, shadowed(10, digest="sha256:" + "7" * 64))
    assert rollout.collect()["rpi4"].shadow is None


def test_a_median_slope_is_moved_little_by_leaps_and_its_variance_covers_the_truth() -> None:
    draw, outside = random.Random(4), 0
    for _ in range(200):
        points, level = [], 0.0
        for minute in range(20):
            level += draw.gauss(0, 1e5)
            points.append((60.0 * minute, 2e8 + 5e5 * minute + level + draw.gauss(0, 3e5)))
        found, variance = slope(points)
        assert found is not None
        outside += abs(found - 5e5) > 3 * (variance + 1e10) ** 0.5
    assert outside <= 10
    leaps = [(60.0 * minute, 1e8 + (5e7 if minute == 7 else 0)) for minute in range(20)]
    assert slope(leaps)[0] == pytest.approx(0.0, abs=1e5)
    assert slope([(0.0, 1.0), (60.0, 2.0)]) == (None, 0.0)
