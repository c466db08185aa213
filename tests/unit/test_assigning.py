"""Several bundles of one target: a few devices measure two, the others get the best, and every count knows one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.bundles import make_bundle
from tests.support.staged_fleet import START, StagedFleet, latency

from kedge.cli.rollout import choice_text
from kedge.fleet import candidates
from kedge.fleet.assigning import HOLD_SECONDS
from kedge.fleet.candidates import MEASURING, Assigned, Candidate, Evidence, Figure, Timing
from kedge.fleet.results import Progress
from kedge.fleet.rollouts import Wanted
from kedge.fleet.staged.policy import OnAbort, Policy
from kedge_protocol import candidates as rule
from kedge_protocol.bundle.layout import Layout
from kedge_protocol.errors import FleetError
from kedge_protocol.messages import Failure, ReportedCandidate

FIRST, SECOND, THIRD = "onnxruntime", "openvino", "tflite"
BOARD = "rpi5"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("layouts")
    return {
        "1.0": make_bundle(folder, version="1.0", target=(BOARD, "rpi4")),
        "2.0": make_bundle(folder, version="2.0", target=BOARD, head_seed=1, also={SECOND: None}),
        "3.0": make_bundle(folder, version="3.0", target=BOARD, head_seed=2, also={SECOND: None}),
        "4.0": make_bundle(folder, version="4.0", target=BOARD, head_seed=3, also={SECOND: None, THIRD: None}),
    }


@pytest.fixture
def fleet(tmp_path: Path, published: dict[str, Path]) -> Iterator[StagedFleet]:
    with StagedFleet(tmp_path, published) as made:
        made.bundles = bundles(published)  # type: ignore[attr-defined]
        yield made


def bundles(published: dict[str, Path]) -> dict[tuple[str, str], str]:
    return {
        (version, one.config.backend): one.digest
        for version, layout in published.items()
        for one in Layout(layout).candidates(BOARD)
    }


def digest(fleet: StagedFleet, version: str, backend: str) -> str:
    return str(fleet.bundles[version, backend])  # type: ignore[attr-defined]


def speeds(fleet: StagedFleet, version: str, **takes: float) -> None:
    """Let devices measure so many milliseconds by backend."""
    for device in fleet.devices.values():
        device.takes |= {digest(fleet, version, backend): ms for backend, ms in takes.items()}


def serving(fleet: StagedFleet, version: str, backend: str) -> set[str]:
    return {one.name for one in fleet.devices.values() if one.serving == digest(fleet, version, backend)}


def test_the_first_device_measures_two_and_the_next_gets_what_it_kept(fleet: StagedFleet) -> None:
    (one,) = fleet.add(1, BOARD, prefix="one", labels='{"at": "x"}')
    speeds(fleet, "2.0", onnxruntime=9.0, openvino=3.0)
    fleet.service.rollout_start("tiny:2.0", {"at": "x"})
    fleet.step(1)
    status = fleet.status()
    assert status.devices[0].digest == digest(fleet, "2.0", SECOND)
    fleet.step(2)
    status = fleet.status()
    assert (status.done, status.counts) == (True, {"done": 1})
    assert (status.devices[0].backend, status.devices[0].choice) == (
        SECOND,
        "onnxruntime 9 ms here, openvino 3 ms here",
    )
    (measured,) = [fleet.devices[one]]
    assert [bundle for _, bundle in measured.told] == [digest(fleet, "2.0", FIRST), digest(fleet, "2.0", SECOND)]
    two = fleet.add(3, BOARD, prefix="two", labels='{"at": "y"}')
    fleet.service.rollout_start("tiny:2.0", {"at": "y"})
    fleet.step(2)
    status = fleet.status()
    assert (status.done, status.counts) == (True, {"done": 3})
    assert serving(fleet, "2.0", SECOND) == {one, *two}
    assert not [name for name in two if fleet.devices[name].tried]
    (choice,) = status.choices
    assert [(b.backend, b.devices, round(b.p50_ms or 0.0, 6), b.measured) for b in choice.backends] == [
        (FIRST, 0, 9.0, 1),
        (SECOND, 3, 3.0, 1),
    ]
    assert choice_text(choice) == ("rpi5: onnxruntime on 0 (9 ms on 1 device), openvino on 3 (3 ms on 1 device)")
    latencies = {(m.device, m.bundle): m.p50_ms for m in fleet.service.latencies(BOARD).measurements}
    assert latencies == {(one, digest(fleet, "2.0", FIRST)): 9.0, (one, digest(fleet, "2.0", SECOND)): 3.0}


def test_the_controller_counts_the_bytes_that_a_device_counts(fleet: StagedFleet, published: dict[str, Path]) -> None:
    with fleet.service.database.read() as session:
        (release,) = session.rows("SELECT id FROM release WHERE version = '4.0'")
        counted = {one.digest: one.bytes for one in candidates.of_release(session, release["id"])[BOARD]}
    assert counted == {one.digest: one.transfer_bytes for one in Layout(published["4.0"]).candidates(BOARD)}
    assert len(set(counted.values())) > 1


def test_figures_that_overlap_exactly_decide_alike_on_a_device_and_in_the_controller() -> None:
    for p95_ms in (0.1, 0.3, 0.7, 1.1, 2.3, 4.7):
        timings = [Timing(1, "fast", p95_ms / 1.7, p95_ms), Timing(1, "small", p95_ms, 2 * p95_ms)]
        sizes = {"fast": 2, "small": 1}
        own = [rule.Candidate(size=sizes[t.of], p50_ms=t.p50_ms, p95_ms=t.p95_ms) for t in timings]
        figures = candidates.comparable(timings).items()
        fleets = [rule.Candidate(size=sizes[of], p50_ms=f.p50_ms, p95_ms=f.p95_ms) for of, f in figures]
        assert (rule.choose(own), rule.choose(fleets)) == (1, 1)


def test_a_handful_measures_while_the_others_wait_and_then_all_have_the_best(fleet: StagedFleet) -> None:
    names = fleet.add(20, BOARD)
    speeds(fleet, "2.0", onnxruntime=2.0, openvino=3.0)
    for device in fleet.devices.values():
        device.seconds = 5.0
    fleet.service.rollout_start("tiny:2.0")
    fleet.step(3)
    status = fleet.status()
    assert status.counts == {"fetching": MEASURING, "waiting": 20 - MEASURING}
    assert {one.choice for one in status.devices if one.progress is Progress.WAITING} == {
        "other devices of its target measure first"
    }
    assert (status.choices[0].measuring, status.choices[0].waiting) == (MEASURING, 20 - MEASURING)
    with pytest.raises(FleetError, match="cannot be removed"):
        fleet.service.release_remove("tiny:2.0")
    fleet.step(20)
    status = fleet.status()
    assert (status.done, status.counts) == (True, {"done": 20})
    assert serving(fleet, "2.0", FIRST) == set(names)
    assert len([one for one in fleet.devices.values() if one.tried]) == MEASURING


def test_those_that_wait_wait_no_longer_than_they_may(fleet: StagedFleet) -> None:
    names = fleet.add(6, BOARD)
    for name in names[:MEASURING]:
        fleet.devices[name].deaf = True
    fleet.service.rollout_start("tiny:2.0")
    fleet.step(int(HOLD_SECONDS) - 20, every=10)
    assert fleet.status().counts == {"offline": MEASURING, "waiting": 2}
    fleet.step(40, every=10)
    # Without figures the compiler's choice.
    assert serving(fleet, "2.0", FIRST) == set(names[MEASURING:])
    for name in names[:MEASURING]:
        fleet.devices[name].deaf = False
    speeds(fleet, "2.0", onnxruntime=9.0, openvino=3.0)
    fleet._numbers.clear()
    fleet.step(3)
    assert serving(fleet, "2.0", SECOND) == set(names[:MEASURING])
    assert fleet.status().done


def test_a_candidate_that_is_refused_leads_to_the_other_and_no_device_gets_it_again(fleet: StagedFleet) -> None:
    names = fleet.add(2, BOARD)
    for name in names:
        fleet.devices[name].fails[digest(fleet, "2.0", FIRST)] = ["prove"]
    fleet.service.rollout_start("tiny:2.0")
    fleet.step(3)
    assert serving(fleet, "2.0", SECOND) == set(names)
    assert fleet.status().done
    later = fleet.add(3, BOARD, prefix="later", labels='{"at": "y"}')
    fleet.service.rollout_start("tiny:2.0", {"at": "y"})
    fleet.step(2)
    assert serving(fleet, "2.0", SECOND) == {*names, *later}
    status = fleet.status()
    assert status.devices[0].choice == "onnxruntime was refused, openvino 5 ms on 2 devices"
    assert [(b.backend, b.refused) for b in status.choices[0].backends] == [(FIRST, 2), (SECOND, 0)]


def test_a_device_that_can_keep_neither_has_failed_and_lets_nobody_wait(fleet: StagedFleet) -> None:
    names = fleet.add(7, BOARD)
    for backend in (FIRST, SECOND):
        fleet.devices[names[0]].fails[digest(fleet, "2.0", backend)] = ["prove"]
    fleet.service.rollout_start("tiny:2.0")
    fleet.step(5)
    status = fleet.status()
    assert status.counts == {"done": 6, "failed": 1}
    assert next(one for one in status.devices if one.device == names[0]).progress is Progress.FAILED


def test_the_next_release_goes_by_the_figures_of_the_one_before(fleet: StagedFleet) -> None:
    names = fleet.add(5, BOARD)
    speeds(fleet, "2.0", onnxruntime=9.0, openvino=3.0)
    fleet.service.rollout_start("tiny:2.0")
    fleet.step(5)
    for device in fleet.devices.values():
        device.tried = False
    fleet.service.rollout_start("tiny:3.0")
    fleet.step(3)
    assert serving(fleet, "3.0", SECOND) == set(names)
    assert not [one for one in fleet.devices.values() if one.tried]
    status = fleet.status()
    assert status.done
    assert "with 2.0" in status.devices[0].choice
    assert status.choices[0].backends[1].figures_of == "2.0"
    # A third backend is new: that has to be measured.
    speeds(fleet, "4.0", onnxruntime=9.0, openvino=3.0, tflite=1.0)
    fleet.service.rollout_start("tiny:4.0")
    fleet.step(8)
    assert serving(fleet, "4.0", THIRD) >= set(names[MEASURING:])
    assert len([one for one in fleet.devices.values() if one.tried]) == MEASURING
    assert fleet.status().done


def test_what_an_earlier_release_says_may_be_wrong_and_leads_to_the_other(fleet: StagedFleet) -> None:
    names = fleet.add(5, BOARD)
    speeds(fleet, "2.0", onnxruntime=9.0, openvino=3.0)
    fleet.service.rollout_start("tiny:2.0")
    fleet.step(5)
    for device in fleet.devices.values():
        device.fails[digest(fleet, "3.0", SECOND)] = ["prove"]
    fleet.service.rollout_start("tiny:3.0")
    fleet.step(4)
    assert serving(fleet, "3.0", FIRST) == set(names)
    status = fleet.status()
    assert (status.done, status.counts) == (True, {"done": 5})
    assert [(one.backend, one.refused) for one in status.choices[0].backends] == [(FIRST, 0), (SECOND, 5)]


def test_where_two_are_refused_the_third_is_given(fleet: StagedFleet) -> None:
    (name,) = fleet.add(1, BOARD)
    fleet.devices[name].fails |= {digest(fleet, "4.0", backend): ["prove"] for backend in (FIRST, SECOND)}
    fleet.service.rollout_start("tiny:4.0")
    fleet.step(4)
    assert serving(fleet, "4.0", THIRD) == {name}
    assert fleet.status().done


def test_a_device_whose_bundles_all_fail_tries_each_once(fleet: StagedFleet) -> None:
    (name,) = fleet.add(1, BOARD)
    device = fleet.devices[name]
    device.fails |= {digest(fleet, "4.0", backend): ["prove"] for backend in (FIRST, SECOND, THIRD)}
    fleet.service.rollout_start("tiny:4.0")
    fleet.step(20)
    assert fleet.status().counts == {"failed": 1}
    assert len(device.told) == 2


def test_what_it_kept_and_cannot_serve_leads_to_the_other(fleet: StagedFleet) -> None:
    (name,) = fleet.add(1, BOARD)
    device = fleet.devices[name]
    speeds(fleet, "2.0", onnxruntime=9.0, openvino=3.0)
    fleet.service.rollout_start("tiny:2.0")
    fleet.step(3)
    assert serving(fleet, "2.0", SECOND) == {name}
    device.failure = Failure(digest=digest(fleet, "2.0", SECOND), stage="serve", reason="it crashes")
    fleet.step(3)
    assert serving(fleet, "2.0", FIRST) == {name}
    assert fleet.status().done


def test_a_plan_says_what_those_that_measure_pull_too(fleet: StagedFleet, published: dict[str, Path]) -> None:
    fleet.add(MEASURING + 3, BOARD)
    sizes = []
    for bundle in Layout(published["2.0"]).candidates(BOARD):
        layers = {layer.digest: layer.size for layer in (*bundle.manifest.layers, bundle.manifest.config)}
        sizes.append({**layers, bundle.digest: len(bundle.raw)})
    one, both = sum(sizes[0].values()), sum((sizes[0] | sizes[1]).values())
    wanted = Policy(waves=("2", "100%"), min_per_target=2)
    plan = fleet.service.rollout_plan("tiny:2.0", policy=wanted)
    assert [wave.bytes for wave in plan.waves] == [2 * both, 2 * both + 3 * one]


def test_an_older_agent_takes_the_first_and_lets_nobody_wait(fleet: StagedFleet) -> None:
    names = fleet.add(6, BOARD)
    for device in fleet.devices.values():
        device.measures = False
    fleet.service.rollout_start("tiny:2.0")
    fleet.step(6)
    assert serving(fleet, "2.0", FIRST) == set(names)
    status = fleet.status()
    assert status.done
    assert status.devices[0].choice == "its agent measures no candidates"


def test_the_way_back_is_to_what_was_before(fleet: StagedFleet) -> None:
    names = fleet.add(3, BOARD)
    fleet.settle("1.0")
    speeds(fleet, "2.0", onnxruntime=9.0, openvino=3.0)
    number = fleet.service.rollout_start("tiny:2.0").rollout.id
    fleet.step(4)
    assert serving(fleet, "2.0", SECOND) == set(names)
    assert {one.previous for one in fleet.status().devices} == {digest(fleet, "1.0", FIRST)}
    fleet.service.rollout_revert(number)
    fleet.step(3)
    assert fleet.serving("1.0") == set(names)
    assert fleet.status().done
    assert fleet.status(number).counts == {"superseded": 3}


def test_a_rollout_that_is_reverted_while_devices_wait_tells_them_nothing(fleet: StagedFleet) -> None:
    names = fleet.add(8, BOARD)
    fleet.settle("1.0")
    for device in fleet.devices.values():
        device.seconds = 30.0
    number = fleet.service.rollout_start("tiny:2.0").rollout.id
    fleet.step(2)
    fleet.service.rollout_revert(number)
    fleet.step(40)
    fleet.step(int(HOLD_SECONDS), every=60)
    assert fleet.serving("1.0") == set(names)
    assert fleet.status().done


def test_the_waves_of_a_staged_rollout_count_devices_with_any_of_the_candidates(fleet: StagedFleet) -> None:
    names = fleet.add(12, BOARD)
    fleet.settle("1.0")
    # Two of the first wave's devices are of another kind than their target says.
    speeds(fleet, "2.0", onnxruntime=9.0, openvino=3.0)
    wanted = Policy(waves=("3", "100%"), min_per_target=2, soak=60.0, progress_timeout=120.0)
    fleet.service.rollout_start("tiny:2.0", policy=wanted)
    members = [one.device for one in fleet.status().devices if one.wave == 1]
    fleet.devices[members[0]].takes |= {digest(fleet, "2.0", FIRST): 1.0}
    fleet.step(5)
    assert fleet.stage().steps == {"serving": 3, "waiting": 9}
    assert serving(fleet, "2.0", FIRST) == {members[0]}
    stage = fleet.until("done")
    assert stage.steps == {"serving": 12}
    status = fleet.status()
    assert (status.done, status.counts) == (True, {"done": 12})
    assert serving(fleet, "2.0", SECOND) == set(names) - {members[0]}
    (choice,) = status.choices
    assert [one.devices for one in choice.backends] == [1, 11]
    assert {one.name for one in fleet.devices.values() if one.tried} == set(members)


def test_a_device_that_waits_for_others_is_not_silent(fleet: StagedFleet) -> None:
    names = fleet.add(9, BOARD)
    fleet.settle("1.0")
    for device in fleet.devices.values():
        device.seconds = 200.0
    wanted = Policy(waves=("100%",), min_per_target=2, soak=60.0, progress_timeout=60.0)
    fleet.service.rollout_start("tiny:2.0", policy=wanted)
    fleet.step(190, every=10)
    assert fleet.status().counts == {"fetching": MEASURING, "waiting": len(names) - MEASURING}
    assert fleet.stage().steps == {"updating": len(names)}
    stage = fleet.until("done")
    assert stage.steps == {"serving": len(names)}
    assert fleet.status().done


def test_a_rollout_that_was_aborted_and_kept_gives_nothing_more(fleet: StagedFleet) -> None:
    names = fleet.add(6, BOARD)
    fleet.settle("1.0")
    for device in fleet.devices.values():
        device.seconds = 50.0
    wanted = Policy(waves=("100%",), min_per_target=2, soak=60.0, progress_timeout=120.0, on_abort=OnAbort.KEEP)
    number = fleet.service.rollout_start("tiny:2.0", policy=wanted).rollout.id
    fleet.step(10)
    fleet.service.rollout_abort(number)
    fleet.step(int(HOLD_SECONDS) + 100, every=10)
    assert len(fleet.serving("1.0")) == len(names) - MEASURING
    told = [one for one in fleet.devices.values() if one.told]
    assert len(told) == MEASURING


def test_a_staged_rollout_in_which_both_fail_is_taken_back(fleet: StagedFleet) -> None:
    names = fleet.add(6, BOARD)
    fleet.settle("1.0")
    for device in fleet.devices.values():
        device.fails |= {digest(fleet, "2.0", backend): ["prove"] for backend in (FIRST, SECOND)}
    wanted = Policy(waves=("2", "100%"), min_per_target=2, soak=60.0, progress_timeout=120.0)
    number = fleet.service.rollout_start("tiny:2.0", policy=wanted).rollout.id
    assert fleet.until("aborted", rollout=number).wave == 1
    assert fleet.serving("1.0") == set(names)


def test_two_candidates_are_vouched_for_by_one_statement(fleet: StagedFleet) -> None:
    fleet.add(1, BOARD)
    fleet.service.rollout_start("tiny:2.0")
    fleet.step(1)
    (device,) = fleet.devices.values()
    assert device.first is not None
    assert (device.first.rivals, len(device.first.releases)) == ({"tiny": digest(fleet, "2.0", SECOND)}, 1)
    assert set(device.first.sizes) == {digest(fleet, "2.0", FIRST), digest(fleet, "2.0", SECOND)}


def test_a_slow_device_among_the_measuring_ones_does_not_decide(fleet: StagedFleet) -> None:
    fleet.add(12, BOARD)
    speeds(fleet, "4.0", onnxruntime=9.0, openvino=6.0, tflite=3.0)
    # Whoever measures the third candidate first is ten times as slow in all.
    slow = sorted(fleet.devices)[1]
    fleet.devices[slow].takes = {bundle: 10 * ms for bundle, ms in fleet.devices[slow].takes.items()}
    fleet.service.rollout_start("tiny:4.0")
    fleet.step(5)
    assert len(serving(fleet, "4.0", THIRD)) >= 12 - MEASURING + 1
    choice = fleet.status().choices[0]
    found = {one.backend: one.p50_ms for one in choice.backends}
    assert found == pytest.approx({FIRST: 9.0, SECOND: 6.0, THIRD: 3.0}, rel=0.01)


@settings(max_examples=100, deadline=None)
@given(
    parts=st.lists(st.floats(0.1, 50.0), min_size=2, max_size=5),
    devices=st.lists(st.floats(0.1, 10.0), min_size=4, max_size=8),
)
def test_what_devices_of_any_speed_measured_in_pairs_is_put_in_the_right_order(
    parts: list[float], devices: list[float]
) -> None:
    timings = [
        Timing(number, str(of), speed * parts[of], 1.1 * speed * parts[of])
        for number, speed in enumerate(devices)
        for of in (0, 1 + number % (len(parts) - 1))
    ]
    figures = candidates.comparable(timings)
    first = figures["0"].p50_ms / parts[0]
    assert {int(of): one.p50_ms / first for of, one in figures.items()} == pytest.approx(
        dict(enumerate(parts)), rel=1e-3
    )


def candidate(name: str) -> Candidate:
    return Candidate(wanted=Wanted(name, 1), backend=name, bytes=1)


@settings(max_examples=200, deadline=None)
@given(
    count=st.integers(2, 5),
    known=st.dictionaries(st.integers(0, 4), st.floats(0.1, 100.0)),
    refused=st.dictionaries(st.integers(0, 4), st.integers(1, 3)),
    measurers=st.integers(0, MEASURING + 2),
    under_way=st.integers(0, MEASURING),
    devices=st.integers(1, 30),
    may_wait=st.booleans(),
)
def test_whatever_is_known_a_device_gets_two_at_most_and_few_measure(
    count: int,
    known: dict[int, float],
    refused: dict[int, int],
    measurers: int,
    under_way: int,
    devices: int,
    may_wait: bool,
) -> None:
    several = [candidate(f"c{number}") for number in range(count)]
    evidence = Evidence(
        figures={f"c{n}": Figure(p50_ms=ms, p95_ms=ms, devices=1) for n, ms in known.items() if n < count},
        refused={f"c{n}": times for n, times in refused.items() if n < count},
        measurers=measurers,
        under_way=min(under_way, measurers),
    )
    decided = candidates.decide(several, evidence, range(devices), may_wait=may_wait)
    assert list(decided) == list(range(devices))
    states = [one.state for one in decided.values()]
    assert states.count(Assigned.MEASURING) <= max(0, MEASURING - measurers)
    alive = [one.digest for one in several if not evidence.is_refused(one.digest)] or [one.digest for one in several]
    for one in decided.values():
        assert set(one.wanted.digests) <= set(alive)
        assert (one.wanted.rival is not None) == (one.state is Assigned.MEASURING)
        assert len(set(one.wanted.digests)) == len(one.wanted.digests)
    if Assigned.WAITING in states:
        assert may_wait
        assert Assigned.MEASURING in states or under_way
    if all(one in evidence.figures for one in alive):
        fastest = min(alive, key=lambda one: evidence.figures[one].p50_ms)
        best = evidence.figures[fastest].p50_ms
        assert {evidence.figures[one.wanted.digest].p50_ms for one in decided.values()} == {best}


def test_what_a_device_says_of_other_bundles_or_before_it_was_asked_settles_nothing(fleet: StagedFleet) -> None:
    (name,) = fleet.add(1, BOARD)
    fleet.settle("1.0")
    device = fleet.devices[name]
    device.deaf = True
    fleet.service.rollout_start("tiny:2.0")
    fleet.step(1)
    assert fleet.now > START
    other = digest(fleet, "3.0", FIRST)
    device.deaf = False
    before = device.desired
    device.candidates = (ReportedCandidate(digest=other, latency=latency(other, 1.0), kept=True),)
    fleet._report(name, device)
    fleet._records.write(fleet._inbox.digest())
    assert device.desired is before
    assert fleet.status().devices[0].digest == digest(fleet, "2.0", FIRST)
