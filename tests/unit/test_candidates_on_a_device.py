"""Two candidates for one model: a device proves and measures both, keeps the better one, and reports both."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.update_world import Release, World, make_release, sample, serving

from kedge_agent.serving import bundle_watch
from kedge_agent.update import events
from kedge_agent.update.settings import Settings
from kedge_protocol import codec
from kedge_protocol.blocks import BLOCK_SIZE
from kedge_protocol.bundle.config import RuntimeRequirement
from kedge_protocol.candidates import Candidate, choose
from kedge_protocol.messages import Desired, ModelState, Shadow

pytestmark = pytest.mark.device

ONE, TWO = "sha256:" + "1" * 64, "sha256:" + "2" * 64


def candidates(world: World, *, blocks: tuple[float, float] = (3.5, 2.5)) -> tuple[Release, Release]:
    """Two bundles of one release, named A and B."""
    made = [
        make_release({"model.bin": sample(seed, int(size * BLOCK_SIZE))}, version=name)
        for seed, name, size in zip((1, 2), "AB", blocks, strict=True)
    ]
    return world.controller.add(made[0]), world.controller.add(made[1])


@pytest.fixture(autouse=True, scope="module")
def _simulated_time_goes_faster_than_the_watch_repeats_itself() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(bundle_watch, "REPEAT_SECONDS", 0.0)
        yield


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path / "state")
    world.connect()
    return world


@pytest.mark.parametrize("times", [{"A": 9.0, "B": 2.0}, {"A": 2.0, "B": 9.0}])
def test_the_faster_candidate_is_kept_and_both_are_reported(world: World, times: dict[str, float]) -> None:
    first, second = candidates(world)
    world.proof_times = times
    world.desire(1, first, rival=second)
    world.settle()
    kept, other = (first, second) if times["A"] < times["B"] else (second, first)
    serving(world, kept)
    model = world.models["digits"]
    assert (model.desired, model.previous) == (kept.digest, None)
    told = {one.digest: one for one in model.candidates}
    assert {digest: one.kept for digest, one in told.items()} == {kept.digest: True, other.digest: False}
    measured = {digest: one.latency.p50_ms for digest, one in told.items() if one.latency is not None}
    assert measured == {first.digest: times["A"], second.digest: times["B"]}
    assert model.latency is not None
    assert model.latency.bundle == kept.digest
    assert world.proofs == 2
    # The loser leaves neither a slot nor blobs.
    world.run_disk()
    assert [path.name for path in world.folder().slots.iterdir()] == [kept.digest[7:23]]
    blobs = {path.name for path in (world.state / "blobs" / "sha256").iterdir()}
    assert not blobs & {digest[7:] for digest in other.blobs.keys() - kept.blobs.keys()}


def test_where_the_spreads_overlap_the_smaller_one_is_kept(world: World) -> None:
    first, second = candidates(world, blocks=(6.0, 1.5))
    world.proof_times = {"A": 9.0, "B": 10.0}
    world.desire(1, first, rival=second)
    world.settle()
    serving(world, second)


def test_the_size_that_decides_is_of_all_that_a_device_pulls(world: World) -> None:
    files = {"model.bin": sample(1, BLOCK_SIZE)}
    runtimes = tuple(RuntimeRequirement(distribution="pytest", minimum=minimum) for minimum in ("1.0.0", "1"))
    first, second = (
        world.controller.add(make_release(files, version=name, runtimes=(runtime,)))
        for name, runtime in zip("AB", runtimes, strict=True)
    )
    world.proof_times = {"A": 9.0, "B": 9.0}
    world.desire(1, first, rival=second)
    world.settle()
    serving(world, second)


@pytest.mark.parametrize("fails", ["A", "B"])
def test_a_candidate_that_fails_its_proof_leads_to_the_other(world: World, fails: str) -> None:
    first, second = candidates(world)
    world.proof_times = {"A": 1.0, "B": 9.0} if fails == "A" else {"A": 9.0, "B": 1.0}
    world.proof_fails = {fails}
    world.desire(1, first, rival=second)
    world.settle()
    kept, refused = (second, first) if fails == "A" else (first, second)
    serving(world, kept)
    model = world.models["digits"]
    assert model.failure is None
    told = {one.digest: one for one in model.candidates}
    failure = told[refused.digest].failure
    assert failure is not None
    assert (failure.stage, told[kept.digest].kept) == ("prove", True)


def test_where_both_fail_what_served_goes_on_and_both_reasons_are_told(world: World) -> None:
    old = world.controller.add(make_release({"model.bin": b"old"}, version="0"))
    world.desire(1, old)
    world.settle()
    first, second = candidates(world)
    world.proof_fails = {"A", "B"}
    world.desire(2, first, rival=second, order=2)
    world.settle()
    model = world.models["digits"]
    assert (model.state, model.desired, model.digest) == (ModelState.FAILED, first.digest, old.digest)
    assert model.failure is not None
    assert model.failure.digest == first.digest
    assert "the other candidate prove: " in model.failure.reason
    assert [one.kept for one in model.candidates] == [False, False]
    world.crash()
    world.connect()
    world.settle()
    assert world.models["digits"].state is ModelState.FAILED
    tried = world.proofs
    world.desire(3, first, rival=second, order=2)
    world.settle()
    assert (world.models["digits"].state, world.proofs) == (ModelState.FAILED, tried)
    assert [one.kept for one in world.models["digits"].candidates] == [False, False]
    # When it is asked for again it tries again.
    world.proof_fails = {"A"}
    world.desire(4, first, rival=second, order=4)
    world.settle()
    serving(world, second)
    assert world.models["digits"].previous == old.digest


def test_the_way_back_leads_to_what_served_before_and_not_to_the_loser(world: World) -> None:
    old = world.controller.add(make_release({"model.bin": b"old"}, version="0"))
    world.desire(1, old)
    world.settle()
    first, second = candidates(world)
    world.proof_times = {"A": 9.0, "B": 1.0}
    world.serve_fails = {second.digest}
    world.desire(2, first, rival=second)
    world.settle()
    world.run_disk()
    model = world.models["digits"]
    assert (model.state, model.digest) == (ModelState.FAILED, old.digest)
    assert model.failure is not None
    assert (model.failure.digest, model.failure.stage) == (second.digest, "serve")
    assert [one.kept for one in model.candidates] == [False, True]


def test_a_choice_outlives_a_restart_and_is_not_made_again(world: World) -> None:
    first, second = candidates(world)
    world.proof_times = {"A": 9.0, "B": 1.0}
    world.desire(1, first, rival=second)
    world.settle()
    told = world.models["digits"].candidates
    world.crash()
    world.connect()
    world.settle()
    serving(world, second)
    assert (world.proofs, world.models["digits"].candidates) == (2, told)
    # The same again under a new version, as after a rotation of keys.
    world.desire(2, first, rival=second)
    world.settle()
    assert world.proofs == 2
    # The controller's answer names the chosen one; what was tried is told no more.
    world.desire(3, second)
    world.settle()
    serving(world, second)
    assert (world.proofs, world.models["digits"].candidates) == (2, ())


def test_one_bundle_given_amid_the_trial_ends_it(world: World) -> None:
    first, second = candidates(world)
    world.desire(1, first, rival=second)
    while world.proofs < 1:
        assert world.disk.run_one() or world.serve_request() or world.deliver() or world.prover.run_one()
    world.desire(2, first)
    world.settle()
    serving(world, first)
    assert world.models["digits"].candidates == ()


def test_what_serves_already_may_be_one_of_the_two(world: World) -> None:
    first, second = candidates(world)
    world.proof_times = {"A": 5.0, "B": 50.0}
    world.desire(1, first)
    world.settle()
    switches = world.folder().generation()
    world.desire(2, first, rival=second)
    world.settle()
    serving(world, first)
    assert world.folder().generation() == switches
    world.proof_times = {"A": 50.0, "B": 5.0}
    world.desire(3, first)
    world.desire(4, first, rival=second)
    world.settle()
    serving(world, second)
    assert world.models["digits"].previous == first.digest


def test_a_second_candidate_without_room_is_not_pulled(tmp_path: Path) -> None:
    world = World(tmp_path / "state", settings=Settings(window=4, reserve_bytes=0))
    world.connect()
    first, second = candidates(world)
    free = world.store.free_bytes
    big = 2 * BLOCK_SIZE

    def room() -> int:
        return big if world.proofs else free()

    world.store.free_bytes = room  # type: ignore[method-assign]
    world.desire(1, first, rival=second)
    world.settle()
    serving(world, first)
    told = world.models["digits"].candidates[1]
    assert told.failure is not None
    assert (told.failure.stage, "of disk" in told.failure.reason) == ("check", True)


STEPS = st.sampled_from(
    ["disk", "disk", "serve", "deliver", "deliver", "prove", "tick", "silence", "disconnect", "connect", "crash",
     "again", "one", "session"]
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    steps=st.lists(STEPS, max_size=60),
    faster=st.sampled_from("AB"),
    fails=st.sampled_from(["", "A", "B"]),
    had=st.booleans(),
)
def test_whatever_happens_the_right_one_of_the_two_serves(steps: list[str], faster: str, fails: str, had: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        first, second = candidates(world)
        old = world.controller.add(make_release({"model.bin": b"old"}, version="0"))
        world.proof_times = {"A": 1.0, "B": 9.0} if faster == "A" else {"A": 9.0, "B": 1.0}
        world.proof_fails = {fails}
        world.connect()
        if had:
            world.desire(1, old)
            world.settle()
        version = 2
        world.desire(version, first, rival=second)
        for step in steps:
            if step == "again":
                version += 1
                world.desire(version, first, rival=second)
            elif step == "one":
                version += 1
                world.desire(version, first)
            else:
                _torment(world, step)
        if not world.online:
            world.connect()
        world.restart_controller(new_boot=False)
        world.desire(version + 1, first, rival=second)
        world.settle()
        passing = [one for one in "AB" if one != fails]
        kept = faster if faster in passing else passing[0]
        serving(world, first if kept == "A" else second)
        model = world.models["digits"]
        assert [one.kept for one in model.candidates] == [kept == "A", kept == "B"]
        world.run_disk()
        assert not list((world.state / "partial").iterdir())
        slots = {path.name for path in world.folder().slots.iterdir()}
        assert slots <= {one[7:23] for one in (model.digest, model.previous) if one}


def _torment(world: World, step: str) -> None:
    if step == "disk":
        world.disk.run_one()
    elif step == "prove":
        world.prover.run_one()
    elif step == "serve":
        world.serve_request()
    elif step == "deliver":
        world.deliver()
    elif step in ("tick", "silence"):
        world.tick(30.0 if step == "silence" else 0.25)
    elif step == "disconnect" and world.online:
        world.disconnect()
    elif step == "connect" and not world.online:
        world.connect()
    elif step == "session":
        world.restart_controller(new_boot=False)
    elif step == "crash":
        world.crash()


@pytest.mark.parametrize("rivals", [{"digits": ONE}, {"other": TWO}, {"digits": "no digest"}])
def test_a_rival_that_is_none_refuses_the_desired_state(world: World, rivals: dict[str, str]) -> None:
    bad = Desired(version=1, models={"digits": ONE}, sizes={ONE: 9}, rivals=rivals)
    world.post(events.DesiredArrived(codec.encode(bad)))
    assert world.machine.desired_version == 0


def test_a_rival_that_is_the_shadow_too_refuses_the_desired_state(world: World) -> None:
    shadows = {"digits": Shadow(digest=TWO, size=9)}
    bad = Desired(version=1, models={"digits": ONE}, sizes={ONE: 9, TWO: 9}, rivals={"digits": TWO}, shadows=shadows)
    world.post(events.DesiredArrived(codec.encode(bad)))
    assert world.machine.desired_version == 0


def test_states_with_other_rivals_have_other_content() -> None:
    plain = Desired(version=1, models={"digits": ONE}, sizes={})
    assert (
        len({plain.content, Desired(version=1, models={"digits": ONE}, sizes={}, rivals={"digits": TWO}).content}) == 2
    )


def made(
    p50: float | None, *, spread: float = 1.1, size: int = 10, failed: bool = False, limit: float | None = None
) -> Candidate:
    p95 = None if p50 is None else p50 * spread
    return Candidate(p50_ms=p50, p95_ms=p95, size=size, failed=failed, max_ms=limit)


@pytest.mark.parametrize(
    ("of", "index"),
    [
        ((made(5.0), made(4.0)), 1),
        ((made(4.2), made(4.0)), 0),  # overlapping spreads, equal sizes: the earlier one
        ((made(4.2), made(4.0, size=9)), 1),
        ((made(4.2, size=9), made(4.0)), 0),
        ((made(1.0, failed=True), made(4.0)), 1),
        ((made(1.0, failed=True), made(4.0, failed=True)), None),
        ((made(9.5, limit=10), made(10.2, limit=10, size=1)), 0),  # the smaller one is beyond the budget
        ((made(11.0, limit=10), made(19.0, limit=10, size=1)), 0),
        ((made(None), made(7.0)), 1),
        ((made(None, size=2), made(None, size=1)), 1),
    ],
)
def test_the_rule(of: tuple[Candidate, ...], index: int | None) -> None:
    assert choose(of) == index
