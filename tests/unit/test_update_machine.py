"""The update machine: whatever the network does, it ends with the right bundle, or says why not."""

from __future__ import annotations

import itertools
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.update_world import Release, World, make_release, serving

from kedge_agent import persistent_state
from kedge_agent.slots import ModelFolder
from kedge_agent.update import actions, events
from kedge_agent.update.settings import Settings
from kedge_protocol import codec, digest
from kedge_protocol import digest as digests
from kedge_protocol.blocks import BLOCK_SIZE, BlockAnswer, BlockStatus
from kedge_protocol.bundle import config as cfg
from kedge_protocol.messages import BlobKind, Desired, DesiredRefusal, ModelState

pytestmark = pytest.mark.device


def data(seed: int, blocks: float) -> bytes:
    """Pseudo-random bytes of so many blocks."""
    import random

    return random.Random(seed).randbytes(int(blocks * BLOCK_SIZE))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "state")


def test_a_bundle_is_pulled_proved_switched_to_and_served(world: World) -> None:
    release = world.controller.add(make_release({"model.bin": data(1, 9.5), "labels.txt": b"a\nb\n"}))
    world.connect()
    world.desire(1, release)
    world.settle()
    serving(world, release)
    model = world.models["digits"]
    assert (model.blocks_done, model.blocks_total) == (12, 12)
    assert model.bytes_received >= 9.5 * BLOCK_SIZE
    assert model.version == "1.0"
    assert world.proofs == 1
    assert max(world.controller.served.values()) == 1


def test_the_same_or_an_older_desired_version_changes_nothing(world: World) -> None:
    first = world.controller.add(make_release({"model.bin": data(1, 2)}))
    other = world.controller.add(make_release({"model.bin": data(2, 2)}, version="2.0"))
    world.connect()
    world.desire(5, first)
    world.settle()
    world.desire(5, other)
    world.desire(4, other)
    world.settle()
    serving(world, first)
    assert world.machine.desired_version == 5


def test_blocks_that_an_older_blob_holds_are_copied_not_pulled(world: World) -> None:
    old = data(1, 20)
    new = old[: 15 * BLOCK_SIZE] + data(2, 1) + old[16 * BLOCK_SIZE :]
    first = world.controller.add(make_release({"model.bin": old}))
    second = world.controller.add(make_release({"model.bin": new}, version="2.0"))
    world.connect()
    world.desire(1, first)
    world.settle()
    world.desire(2, second)
    world.settle()
    serving(world, second)
    pulled = [key for key in world.controller.served if key[0] == digests.of_bytes(new) and key[1] is BlobKind.BLOB]
    assert [index for _, _, index in pulled] == [15]
    assert world.models["digits"].previous == first.digest


def test_a_block_that_repeats_within_a_blob_is_pulled_once(world: World) -> None:
    release = world.controller.add(make_release({"model.bin": bytes(8 * BLOCK_SIZE) + data(3, 1)}))
    world.connect()
    world.desire(1, release)
    world.settle()
    serving(world, release)
    blocks = [key for key in world.controller.served if key[1] is BlobKind.BLOB and key[0] in release.blobs]
    assert len([key for key in blocks if len(release.blobs[key[0]]) == 9 * BLOCK_SIZE]) <= 2


def test_what_is_there_already_is_not_pulled_again_on_the_way_back(world: World) -> None:
    first = world.controller.add(make_release({"model.bin": data(1, 5)}))
    second = world.controller.add(make_release({"model.bin": data(2, 5)}, version="2.0"))
    world.connect()
    for version, release in enumerate((first, second), start=1):
        world.desire(version, release)
        world.settle()
    before = sum(world.controller.served.values())
    world.desire(3, first)
    world.settle()
    serving(world, first)
    assert sum(world.controller.served.values()) == before
    assert world.proofs == 3


def test_golden_vectors_that_do_not_hold_leave_the_old_bundle_serving(world: World) -> None:
    first = world.controller.add(make_release({"model.bin": data(1, 3)}))
    broken = world.controller.add(make_release({"model.bin": data(2, 3)}, version="2.0"))
    world.proof_fails = {"2.0"}
    world.connect()
    world.desire(1, first)
    world.settle()
    world.desire(2, broken)
    world.settle()
    model = world.models["digits"]
    assert model.state is ModelState.FAILED
    assert model.digest == first.digest
    assert model.failure is not None
    assert (model.failure.digest, model.failure.stage) == (broken.digest, "prove")
    assert "golden vectors do not hold" in model.failure.reason
    assert world.files() == first.files


def test_a_refused_bundle_is_tried_again_only_under_a_new_desired_version(world: World) -> None:
    broken = world.controller.add(make_release({"model.bin": data(2, 3)}))
    world.proof_fails = {"1.0"}
    world.connect()
    world.desire(1, broken)
    world.settle()
    for _ in range(3):
        world.crash()
        world.connect()
        world.desire(1, broken)
        world.settle()
    assert world.proofs == 1
    failure = world.models["digits"].failure
    assert failure is not None
    assert failure.stage == "prove"
    world.proof_fails = set()
    world.desire(2, broken)
    world.settle()
    serving(world, broken)


def test_what_failed_is_not_tried_again_because_something_else_of_the_state_changes(world: World) -> None:
    first = world.controller.add(make_release({"model.bin": data(1, 3)}))
    broken = world.controller.add(make_release({"model.bin": data(2, 3)}, version="2.0"))
    other = world.controller.add(make_release({"model.bin": data(3, 3)}, version="3.0"))
    world.proof_fails = {"2.0"}
    world.connect()
    world.desire(1, first, order=1)
    world.settle()
    world.desire(2, broken, order=2)
    world.settle()
    assert world.proofs == 2
    world.desire(3, broken, order=2, shadow=other)  # also proves the shadow
    world.settle()
    world.desire(4, broken, order=2)
    world.settle()
    world.crash()
    world.connect()
    world.desire(5, broken, order=2)
    world.settle()
    assert world.proofs == 3
    model = world.models["digits"]
    assert (model.state, model.digest) == (ModelState.FAILED, first.digest)
    assert model.failure is not None
    assert model.failure.digest == broken.digest
    world.proof_fails = set()
    world.desire(6, broken, order=6)
    world.settle()
    serving(world, broken)


@pytest.mark.parametrize("order", [0, -1, 3])
def test_a_state_that_was_asked_for_with_a_version_that_is_none_is_left_alone(world: World, order: int) -> None:
    release = world.controller.add(make_release({"model.bin": data(1, 1)}))
    world.connect()
    world.desire(2, release, order=order)
    assert "asked for" in (world.machine.desired_states.problem or "")
    assert world.machine.desired_version == 0


def test_a_bundle_that_does_not_serve_is_rolled_back(world: World) -> None:
    first = world.controller.add(make_release({"model.bin": data(1, 2)}))
    second = world.controller.add(make_release({"model.bin": data(2, 2)}, version="2.0"))
    world.connect()
    world.desire(1, first)
    world.settle()
    world.serve_fails = {second.digest}
    world.desire(2, second)
    world.settle()
    model = world.models["digits"]
    assert (model.state, model.digest) == (ModelState.FAILED, first.digest)
    assert model.failure is not None
    assert (model.failure.stage, model.failure.reason) == ("serve", "the runtime refuses it")
    assert world.files() == first.files


def test_a_serving_process_that_says_nothing_is_not_waited_for_for_ever(world: World) -> None:
    first = world.controller.add(make_release({"model.bin": data(1, 2)}))
    world.connect()
    world.look_at_serving = lambda: None  # type: ignore[method-assign]
    world.desire(1, first)
    world.settle()
    model = world.models["digits"]
    assert (model.state, model.digest) == (ModelState.FAILED, None)
    assert model.failure is not None
    assert "did not load it within 30 s" in model.failure.reason


def test_a_model_that_is_desired_no_more_is_removed(world: World) -> None:
    first = world.controller.add(make_release({"model.bin": data(1, 2)}))
    world.connect()
    world.desire(1, first)
    world.settle()
    generation = world.folder().generation()
    world.desire(2)
    world.settle()
    assert world.models == {}
    assert world.folder().current() is None
    assert world.folder().generation() > generation
    assert not list((world.state / "blobs" / "sha256").iterdir())


def test_another_desired_state_amid_a_download_abandons_it_and_keeps_what_came(world: World) -> None:
    first = world.controller.add(make_release({"model.bin": data(1, 12)}))
    second = world.controller.add(make_release({"model.bin": data(2, 2)}, version="2.0"))
    world.connect()
    world.desire(1, first)
    while world.models["digits"].blocks_done < 6:
        assert world.disk.run_one() or world.serve_request() or world.deliver()
    world.desire(2, second)
    world.requests.clear()
    world.answers.clear()
    world.run_disk()
    world.desire(3, first)
    world.settle()
    serving(world, first)
    # Four were under way when it was abandoned.
    assert sum(world.controller.served.values()) <= 12 + 4 + 10


@pytest.mark.parametrize("away", ["never there", "left"])
def test_without_a_controller_it_waits_and_says_so(world: World, away: str) -> None:
    release = world.controller.add(make_release({"model.bin": data(1, 3)}))
    world.online = True
    world.post(events.Connected())
    if away == "left":
        world.connect()
    world.desire(1, release)
    world.run_disk()
    if away == "left":
        world.serve_request()
        world.controller_leaves()
    for _ in range(400):
        world.tick(1.0)
    assert not world.requests
    assert world.models["digits"].state is ModelState.WAITING
    assert world.models["digits"].detail == "the controller is away"
    world.restart_controller(new_boot=False)
    world.settle()
    serving(world, release)


def test_lost_answers_are_asked_for_again_only_after_a_long_silence_that_grows(world: World) -> None:
    release = world.controller.add(make_release({"model.bin": data(1, 3)}))
    world.connect()
    world.desire(1, release)
    world.run_disk()
    asked_at = []
    for _ in range(1000):
        if world.requests:
            asked_at.append(world.now)
            world.requests.clear()
        world.tick(1.0)
    waits = [later - earlier for earlier, later in itertools.pairwise(asked_at)]
    assert waits[0] >= 20
    assert waits == sorted(waits)
    assert len(waits) <= 6
    assert "does not answer" in (world.models["digits"].detail or "")
    world.settle()
    serving(world, release)


def test_a_late_will_of_an_earlier_controller_stops_nothing(world: World) -> None:
    release = world.controller.add(make_release({"model.bin": data(1, 3)}))
    world.connect()
    old = world.controller.status
    world.restart_controller(new_boot=True)
    world.post(events.ControllerSeen(type(old)(online=False, boot_id=old.boot_id, session=old.session)))
    world.desire(1, release)
    world.settle()
    serving(world, release)


def test_a_block_that_stays_broken_fails_the_download(world: World) -> None:
    release = world.controller.add(make_release({"model.bin": data(1, 6)}))
    world.controller.broken = lambda request, index: index == 4
    world.connect()
    world.desire(1, release)
    world.settle()
    failure = world.models["digits"].failure
    assert failure is not None
    assert failure.stage == "fetch"
    assert "block 4" in failure.reason
    broken = [count for (_, kind, index), count in world.controller.served.items() if index == 4]
    assert broken == [3]


def test_a_block_that_was_broken_once_is_asked_for_again(world: World) -> None:
    release = world.controller.add(make_release({"model.bin": data(1, 6)}))
    seen: list[int] = []

    def broken(request: object, index: int) -> bool:
        seen.append(index)
        return seen.count(index) == 1

    world.controller.broken = broken
    world.connect()
    world.desire(1, release)
    world.settle()
    serving(world, release)


def test_a_bundle_packed_wrong_is_refused_by_the_whole_digest(world: World) -> None:
    release = world.controller.add(make_release({"model.bin": data(1, 4)}, wrong_map=True))
    world.connect()
    world.desire(1, release)
    world.settle()
    failure = world.models["digits"].failure
    assert failure is not None
    assert "the whole has digest" in failure.reason
    assert not list((world.state / "partial").iterdir())


def test_a_missing_blob_fails_at_once_and_is_not_asked_for_for_ever(world: World) -> None:
    release = make_release({"model.bin": data(1, 4)})
    world.connect()
    world.desire(1, release)
    world.settle()
    failure = world.models["digits"].failure
    assert failure is not None
    assert "no such blob" in failure.reason
    for _ in range(100):
        world.tick(10.0)
    assert not world.requests


def test_a_busy_controller_is_left_alone_for_a_while(world: World) -> None:
    release = world.controller.add(make_release({"model.bin": data(1, 4)}))
    busy_until = world.now + 30
    times: list[float] = []

    def refuse(request: object) -> BlockStatus | None:
        times.append(world.now)
        return BlockStatus.BUSY if world.now < busy_until else None

    world.controller.refuse = refuse
    world.connect()
    world.desire(1, release)
    world.settle()
    serving(world, release)
    assert len([at for at in times if at < busy_until]) <= 8


@pytest.mark.parametrize(
    ("release", "words"),
    [
        (make_release({"m": data(1, 4)}, target="other"), "target 'other'"),
        (make_release({"m": data(1, 4)}, name="other"), "holds model 'other'"),
        (make_release({"m": data(1, 4)}, memory_bytes=1 << 60), "of memory"),
        (
            make_release({"m": data(1, 4)}, runtimes=(cfg.RuntimeRequirement(distribution="absent-rt", minimum="1"),)),
            "absent-rt >=1; installed is none of them",
        ),
        (
            make_release(
                {"m": data(1, 4)}, runtimes=(cfg.RuntimeRequirement(distribution="pytest", minimum="1", below="2"),)
            ),
            "pytest >=1, <2; installed is pytest",
        ),
    ],
)
def test_what_cannot_run_here_is_refused_before_its_files_are_pulled(world: World, release: object, words: str) -> None:
    world.controller.add(release)  # type: ignore[arg-type]
    world.connect()
    world.desire(1, release)  # type: ignore[arg-type]
    world.settle()
    failure = world.models["digits"].failure
    assert failure is not None
    assert failure.stage == "check"
    assert words in failure.reason
    assert len(world.controller.served) == 2


def test_too_little_disk_refuses_the_bundle(tmp_path: Path) -> None:
    world = World(tmp_path / "state", settings=Settings(window=4, reserve_bytes=1 << 60))
    release = world.controller.add(make_release({"model.bin": data(1, 4)}))
    world.connect()
    world.desire(1, release)
    world.settle()
    failure = world.models["digits"].failure
    assert failure is not None
    assert "of disk" in failure.reason
    assert [action for action in world.log if isinstance(action, actions.CollectGarbage)]


def test_a_disk_that_fills_up_fails_the_download_and_gives_the_space_back(world: World) -> None:
    first = world.controller.add(make_release({"model.bin": data(1, 2)}))
    release = world.controller.add(make_release({"model.bin": data(2, 8)}, version="2.0"))
    world.connect()
    world.desire(1, first)
    world.settle()
    write, count = world.store.write, [0]

    def full(digest: str, index: int, payload: bytes | memoryview) -> None:
        count[0] += 1
        if count[0] > 4:
            raise OSError(28, "No space left on device")
        write(digest, index, payload)

    world.store.write = full  # type: ignore[method-assign]
    world.desire(2, release)
    world.settle()
    model = world.models["digits"]
    assert model.failure is not None
    assert "No space left on device" in model.failure.reason
    assert model.digest == first.digest
    assert not list((world.state / "partial").iterdir())


def test_two_models_share_blobs_and_do_not_wait_for_each_other(world: World) -> None:
    shared = data(1, 6)
    good = world.controller.add(make_release({"model.bin": shared}, name="good"))
    twin = world.controller.add(make_release({"model.bin": shared}, name="twin"))
    lost = make_release({"model.bin": data(2, 2)}, name="lost")
    world.connect()
    world.desire(1, good, twin, lost, names=("good", "twin", "lost"))
    world.settle()
    serving(world, good, "good")
    serving(world, twin, "twin")
    assert world.models["lost"].state is ModelState.FAILED
    assert max(world.controller.served.values()) == 1


def test_a_desired_state_that_cannot_be_read_is_left_alone(world: World) -> None:
    for raw in (b"", b"[]", b"{}", b'{"version": 1, "models": {"../x": "sha256:1"}, "sizes": {}}', b"\xff"):
        world.post(events.DesiredArrived(raw))
        assert world.machine.desired_states.problem is not None
    assert world.models == {}


def test_answers_nobody_asked_for_are_dropped(world: World) -> None:
    release = world.controller.add(make_release({"model.bin": data(1, 4)}))
    world.connect()
    world.desire(1, release)
    world.post(events.BlockArrived("boot0-1", BlockAnswer(0, BlockStatus.OK, b"x" * 100)))
    world.post(events.BlockArrived("boot1-1", BlockAnswer(10**6, BlockStatus.OK, b"x" * 100)))
    world.settle()
    serving(world, release)


def test_progress_is_reported_at_most_once_a_second(world: World) -> None:
    release = world.controller.add(make_release({"model.bin": data(1, 200)}))
    world.connect()
    world.desire(1, release)
    while world.models["digits"].blocks_done < 150:
        if not (world.disk.run_one() or world.serve_request() or world.deliver()):
            world.tick(0.01)
    assert world.reports < 20


STEPS = st.sampled_from(
    ["disk", "disk", "serve", "serve", "deliver", "deliver", "deliver", "late", "twice", "lose", "lose request",
     "tick", "silence", "disconnect", "connect", "controller", "session", "leave", "crash", "prove", "desire", "call",
     "endpoint", "shadow", "rival"]
)  # fmt: skip


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    steps=st.lists(STEPS, max_size=80),
    sizes=st.lists(st.floats(0.1, 7.0), min_size=1, max_size=3),
    seed=st.integers(0, 1 << 16),
)
def test_whatever_happens_it_ends_serving_the_right_bytes(steps: list[str], sizes: list[float], seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder), seed=seed)
        old_files = {f"f{index}": data(seed + index, size) for index, size in enumerate(sizes)}
        # The newer release keeps the first file's blocks but one.
        new_files = {**old_files, "f0": old_files["f0"][:-1] + b"!"}
        old = world.controller.add(make_release(old_files))
        new = world.controller.add(make_release(new_files, version="2.0"))
        version = 1
        world.connect()
        world.desire(version, old)
        wanted = old
        for step in steps:
            version, wanted = _torment(world, step, version, wanted, (old, new))
        if not world.online:
            world.connect()
        world.restart_controller(new_boot=False)
        # Also without the shadow and the rival that a step may have asked for.
        world.desire(version + bool({"shadow", "rival"} & set(steps)), wanted)
        world.settle()
        serving(world, wanted)
        world.endpoint_silent = False
        for _ in range(20):
            world.tick(1000.0)
            world.prover.run_one()
        served = world.models["digits"].served
        assert served is not None
        # Something attests it, and never more calls than there were.
        assert served.by is not None
        assert served.calls <= steps.count("call")
        world.run_disk()
        assert not list((world.state / "partial").iterdir())
        if not {"desire", "shadow", "rival"} & set(steps):
            # Without a change of mind, which may clean up a partial blob, no finished block is ever served twice.
            assert world.controller.served_again == 0


def _torment(world: World, step: str, version: int, wanted: object, both: tuple) -> tuple:  # type: ignore[type-arg]
    any_answer = world.chance.randrange(len(world.answers)) if world.answers else 0
    if step == "disk":
        world.disk.run_one()
    elif step == "prove":
        world.prover.run_one()
    elif step == "serve":
        world.serve_request()
    elif step == "deliver":
        world.deliver()
    elif step == "late":
        world.deliver(any_answer)
    elif step == "twice":
        world.deliver(any_answer, twice=True)
    elif step == "lose" and world.answers:
        world.answers.pop(any_answer)
    elif step == "lose request" and world.requests:
        world.requests.pop()
    elif step == "tick":
        world.tick()
    elif step == "silence":
        world.tick(30.0)
    elif step == "disconnect" and world.online:
        world.disconnect()
    elif step == "connect" and not world.online:
        world.connect()
    elif step in ("controller", "session"):
        world.restart_controller(new_boot=step == "controller")
    elif step == "leave" and world.online:
        world.controller_leaves()
    elif step == "crash":
        world.crash()
    elif step == "call":
        world.call()
    elif step == "endpoint":
        world.endpoint_silent = not world.endpoint_silent
    elif step == "shadow":
        version += 1
        world.desire(version, wanted, shadow=both[0] if wanted is both[1] else both[1])  # type: ignore[arg-type]
    elif step == "rival":
        version += 1
        world.desire(version, wanted, rival=both[0] if wanted is both[1] else both[1])  # type: ignore[arg-type]
    elif step == "desire":
        version += 1
        wanted = both[version % 2]
        world.desire(version, wanted)  # type: ignore[arg-type]
    return version, wanted


def test_how_far_a_proof_is_and_what_really_ran_it_is_reported(world: World) -> None:
    release = world.controller.add(make_release({"model.bin": data(1, 2)}))
    world.proof_detail = "fell back to the CPU"
    world.connect()
    world.desire(1, release)
    seen = []
    tell = world.machine.handle

    def watched(event: events.Event, now: float) -> list[actions.Action]:
        done = tell(event, now)
        seen.extend((model.state, model.detail) for model in world.models.values())
        return done

    world.machine.handle = watched  # type: ignore[method-assign]  # looked through, not replaced
    world.settle()
    serving(world, release)
    assert (ModelState.PROVING, "building, 1 of 2") in seen
    assert (ModelState.SERVING, "fell back to the CPU") in seen
    assert world.models["digits"].detail == "fell back to the CPU"
    # The serving process knows better, and it may change its mind (a GPU that fails).
    bundle = world.models["digits"].digest
    assert bundle is not None
    world.post(events.Served("digits", bundle, None, "on the GPU"))
    assert world.models["digits"].detail == "on the GPU"


def test_what_a_call_took_is_reported_of_the_bundle_that_serves_and_outlives_a_restart(world: World) -> None:
    first = world.controller.add(make_release({"model.bin": data(1, 2)}))
    world.connect()
    world.desire(1, first)
    world.settle()
    serving(world, first)
    told = world.models["digits"].latency
    assert told is not None
    assert (told.bundle, told.p50_ms, told.p95_ms, told.calls) == (first.digest, 1.5, 3.0, 10)
    assert told.files == digest.of_bytes(first.files["model.bin"])
    world.crash()
    world.connect()
    world.settle()
    assert world.models["digits"].latency == told
    # A bundle that is refused was not measured; what serves was.
    bad = world.controller.add(make_release({"model.bin": data(1, 3)}, version="2.0"))
    world.proof_fails.add("2.0")
    world.desire(2, bad)
    world.settle()
    assert world.models["digits"].state is ModelState.FAILED
    assert world.models["digits"].latency == told
    good = world.controller.add(make_release({"model.bin": data(1, 4)}, version="3.0"))
    world.proof_ms = 9.0
    world.desire(3, good)
    world.settle()
    latency = world.models["digits"].latency
    assert latency is not None
    assert (latency.bundle, latency.p50_ms) == (good.digest, 9.0)


def failure_of(world: World, name: str = "digits") -> tuple[str, str]:
    failure = world.models[name].failure
    assert failure is not None
    return failure.stage, failure.reason


def raising(error: Exception) -> Any:
    def job(*_: object, **__: object) -> None:
        raise error

    return job


FOREIGN = (OSError(5, "Input/output error"), RuntimeError("can't start new thread"), ValueError("a lone \udc80"))


@pytest.mark.parametrize("error", FOREIGN, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    ("owner", "method", "stage"),
    [
        ("store", "open", "fetch"),
        ("store", "put", "fetch"),
        ("store", "finish", "fetch"),
        ("store", "write", "fetch"),
        ("store", "free_bytes", "check"),
        ("folder", "assemble", "check"),
        ("prover", "prove", "prove"),
        ("folder", "switch", "switch"),
    ],
)
def test_an_error_of_any_kind_in_any_job_becomes_a_reported_failure(
    world: World, monkeypatch: pytest.MonkeyPatch, owner: str, method: str, stage: str, error: Exception
) -> None:
    release = world.controller.add(make_release({"model.bin": data(1, 3)}))
    if owner == "store":
        setattr(world.store, method, raising(error))
    elif owner == "prover":
        world.performer._prover = raising(error)
    else:
        monkeypatch.setattr(ModelFolder, method, raising(error))
    world.connect()
    world.desire(1, release)
    world.settle()
    model = world.models["digits"]
    assert (model.state, failure_of(world)[0]) == (ModelState.FAILED, stage)
    codec.encode(model)


@pytest.mark.parametrize("stuck", ["fetch", "check", "prove", "switch"])
def test_a_step_whose_job_never_ends_fails_at_its_deadline(tmp_path: Path, stuck: str) -> None:
    world = World(tmp_path / "state", settings=Settings(reserve_bytes=0, disk_deadline=100.0, prove_deadline=200.0))
    release = world.controller.add(make_release({"model.bin": data(1, 3)}))
    waits = {"check": actions.Assemble, "prove": actions.Prove, "switch": actions.Switch}
    world.connect()
    world.desire(1, release)
    while stuck in waits and not any(isinstance(action, waits[stuck]) for action in world.log):
        assert world.disk.run_one() or world.prover.run_one() or world.serve_request() or world.deliver()
    for _ in range(250):
        world.tick(1.0)
    assert failure_of(world)[0] == stuck
    assert "did not end" in failure_of(world)[1]
    if stuck == "switch":
        # It was only late: what serves after all is not called failed.
        world.settle()
        world.run_disk()
        world.tick(1.0)
        serving(world, release)


def test_a_job_that_waits_behind_others_is_not_stuck(tmp_path: Path) -> None:
    world = World(tmp_path / "state", settings=Settings(reserve_bytes=0, prove_deadline=200.0))
    both = [world.controller.add(make_release({"m": data(1, 1)}, name=name)) for name in ("a", "b")]
    world.connect()
    world.desire(1, *both, names=("a", "b"))
    while len(world.prover.waiting) < 2:
        assert world.disk.run_one() or world.serve_request() or world.deliver()
    for _ in range(150):
        world.tick(1.0)
    world.prover.run_one()
    for _ in range(150):
        world.tick(1.0)
    world.settle()
    serving(world, both[0], "a")
    serving(world, both[1], "b")


def test_a_download_without_progress_ends_although_the_controller_is_there(tmp_path: Path) -> None:
    world = World(tmp_path / "state", settings=Settings(reserve_bytes=0, fetch_deadline=5000.0))
    release = world.controller.add(make_release({"model.bin": data(1, 3)}))
    world.connect()
    world.desire(1, release)
    world.run_disk()
    world.controller_leaves()
    for _ in range(100):
        world.tick(100.0)
    assert world.models["digits"].state is ModelState.WAITING
    world.restart_controller(new_boot=True)
    for _ in range(60):
        world.tick(100.0)
    assert failure_of(world) == ("fetch", "the controller is there, but nothing came for 5000 s")


@pytest.mark.parametrize("field", ["size", "digest"])
@pytest.mark.parametrize("where", ["config", "layer"])
def test_a_manifest_without_a_size_or_a_digest_is_refused(world: World, field: str, where: str) -> None:
    release = make_release({"model.bin": data(1, 3)})
    manifest = json.loads(release.blobs[release.digest])
    del (manifest["config"] if where == "config" else manifest["layers"][0])[field]
    raw = json.dumps(manifest).encode()
    world.controller.blobs |= {**release.blobs, digest.of_bytes(raw): raw}
    world.connect()
    world.desire(1, replace(release, digest=digest.of_bytes(raw), size=len(raw)))
    world.settle()
    assert failure_of(world)[0] == "check"
    assert f"{field}: missing" in failure_of(world)[1]


def test_an_empty_blob_that_is_not_what_its_digest_says_fails(world: World) -> None:
    release = make_release({"model.bin": data(1, 3)})
    manifest = json.loads(release.blobs[release.digest])
    manifest["config"]["size"] = 0
    raw = json.dumps(manifest).encode()
    world.controller.blobs |= {**release.blobs, digest.of_bytes(raw): raw}
    world.connect()
    world.desire(1, replace(release, digest=digest.of_bytes(raw), size=len(raw)))
    world.settle()
    assert failure_of(world)[0] == "fetch"
    assert "wrong digest" in failure_of(world)[1]


def told(world: World, version: int, release: Release | None) -> None:
    """A desired state as another controller might send it."""
    models = {} if release is None else {"digits": release.digest}
    sizes = {} if release is None else {release.digest: release.size}
    world.post(events.DesiredArrived(codec.encode(Desired(version=version, models=models, sizes=sizes))))


@pytest.mark.parametrize("version", [1_000_006, (1 << 53) - 1, 1 << 53, 1 << 70])
def test_a_version_that_jumps_too_far_is_refused_and_reported(world: World, version: int) -> None:
    release = world.controller.add(make_release({"model.bin": data(1, 2)}))
    world.connect()
    world.desire(5, release)
    world.settle()
    reports = world.reports
    told(world, version, None)
    world.settle()
    serving(world, release)
    refused = world.machine.desired_states.refused
    assert refused is not None
    assert (refused.version, refused.reason) == (version, DesiredRefusal.JUMP)
    assert world.reports > reports
    world.desire(1_000_005, release)
    assert world.machine.desired_version == 1_000_005
    assert world.machine.desired_states.refused is None


def test_a_device_that_was_locked_out_before_heeds_its_controller_again(tmp_path: Path) -> None:
    world = World(tmp_path / "state")
    release = world.controller.add(make_release({"model.bin": data(1, 2)}))
    world.connect()
    world.desire(5, release)
    world.settle()
    known = persistent_state.read(world.state).memory
    absurd = codec.encode(Desired(version=(1 << 53) - 1, models={"digits": release.digest}, sizes={})).decode()
    persistent_state.write(world.state, persistent_state.AgentFile(boots=1, memory=replace(known, desired=absurd)))
    world.crash()
    world.connect()
    world.settle()
    serving(world, release)
    world.desire(6, release)
    assert world.machine.desired_version == 6


def test_an_equal_version_with_other_content_is_refused_and_both_contents_are_reported(world: World) -> None:
    first = world.controller.add(make_release({"model.bin": data(1, 2)}))
    other = world.controller.add(make_release({"model.bin": data(2, 2)}, version="2.0"))
    world.connect()
    world.desire(5, first)
    world.settle()
    reports = world.reports
    told(world, 5, first)
    assert (world.machine.desired_states.refused, world.reports) == (None, reports)
    told(world, 5, other)
    refused = world.machine.desired_states.refused
    assert refused is not None
    assert refused.reason is DesiredRefusal.CONFLICT
    assert refused.held == Desired(version=1, models={"digits": first.digest}, sizes={}).content
    assert refused.came == Desired(version=1, models={"digits": other.digest}, sizes={}).content
    assert world.reports == reports + 1
    serving(world, first)
    told(world, 6, other)
    world.settle()
    serving(world, other)
    assert world.machine.desired_states.refused is None
    # An older one is answered with a report: its sender learns what this device holds.
    reports = world.reports
    told(world, 4, first)
    assert world.reports == reports + 1


@pytest.mark.parametrize("raw", [b'{"version":0,"models":{},"sizes":{}}', b'{"version":-1,"models":{},"sizes":{}}'])
def test_a_version_that_is_none_changes_nothing(world: World, raw: bytes) -> None:
    world.post(events.DesiredArrived(raw))
    assert world.machine.desired_states.problem is not None
    assert world.machine.desired_version == 0


def test_a_size_below_one_is_refused_before_anything_is_pulled(world: World) -> None:
    release = world.controller.add(make_release({"model.bin": data(1, 2)}))
    world.connect()
    world.desire(1, replace(release, size=-5))
    assert world.machine.desired_states.problem is not None
    world.desire(1, release)
    world.settle()
    serving(world, release)


def test_a_removal_that_failed_is_tried_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    release = world.controller.add(make_release({"model.bin": data(1, 2)}))
    world.connect()
    world.desire(1, release)
    world.settle()
    with monkeypatch.context() as broken:
        broken.setattr(ModelFolder, "remove", raising(OSError(28, "No space left on device")))
        world.desire(2)
        world.settle()
    assert world.folder().current() is not None
    for _ in range(70):
        world.tick(1.0)
    world.run_disk()
    assert world.folder().current() is None
    removals = len([action for action in world.log if isinstance(action, actions.Remove)])
    for _ in range(200):
        world.tick(1.0)
    assert len([action for action in world.log if isinstance(action, actions.Remove)]) == removals


def died(world: World, times: int, *, came_up: bool = True) -> None:
    for _ in range(times):
        world.post(events.ServingDied("was killed by SIGSEGV", came_up))
        world.tick(2.0)


@pytest.fixture
def two_releases(world: World) -> tuple[Release, Release]:
    """The second serves, the first is kept for a roll-back."""
    first = world.controller.add(make_release({"model.bin": data(1, 2)}))
    second = world.controller.add(make_release({"model.bin": data(2, 2)}, version="2.0"))
    world.connect()
    for version, release in enumerate((first, second), start=1):
        world.desire(version, release)
        world.settle()
        serving(world, release)
        if release is first:
            world.tick(700.0)
    return first, second


def test_a_serving_process_that_dies_now_and_then_is_counted_and_no_more(
    world: World, two_releases: tuple[Release, Release]
) -> None:
    for _ in range(5):
        died(world, 2)
        world.tick(700.0)
    serving(world, two_releases[1])
    assert world.machine.serving_restarts == 10


def test_a_crash_loop_soon_after_a_switch_is_rolled_back(world: World, two_releases: tuple[Release, Release]) -> None:
    first, second = two_releases
    died(world, 2)
    serving(world, second)
    died(world, 1)
    world.settle()
    model = world.models["digits"]
    assert (model.state, model.digest) == (ModelState.FAILED, first.digest)
    assert failure_of(world)[0] == "serve"
    assert "died 3 times within 600 s; the last time: it was killed by SIGSEGV" in failure_of(world)[1]
    assert world.machine.serving_restarts == 3
    for _ in range(20):
        world.tick(100.0)
    assert world.models["digits"].digest == first.digest
    # The operator may insist.
    world.desire(3, second)
    world.settle()
    serving(world, second)


def test_probation_outlives_a_restart_and_ends_with_time(world: World, two_releases: tuple[Release, Release]) -> None:
    first, second = two_releases
    world.crash()
    world.connect()
    world.settle()
    assert persistent_state.read(world.state).memory.probation == {"digits": second.digest}
    world.tick(500.0)
    died(world, 1)
    world.tick(300.0)
    assert persistent_state.read(world.state).memory.probation
    world.tick(400.0)
    world.run_disk()
    assert not persistent_state.read(world.state).memory.probation
    died(world, 3)
    world.settle()
    model = world.models["digits"]
    assert (model.state, model.digest, model.previous) == (ModelState.FAILED, second.digest, first.digest)
    # That it serves between two deaths is no recovery; that it does not die any more is.
    for wait, state in ((2.0, ModelState.FAILED), (700.0, ModelState.SERVING)):
        world.watch.forget_all()
        world.tick(wait)
        assert world.models["digits"].state is state
    serving(world, second)


def test_a_first_bundle_in_a_crash_loop_stays_and_is_called_failed(world: World) -> None:
    release = world.controller.add(make_release({"model.bin": data(1, 2)}))
    world.connect()
    world.desire(1, release)
    world.settle()
    died(world, 3)
    world.settle()
    model = world.models["digits"]
    assert (model.state, model.digest) == (ModelState.FAILED, release.digest)


def test_a_serving_process_that_never_comes_up_is_no_bundles_fault(
    world: World, two_releases: tuple[Release, Release]
) -> None:
    died(world, 5, came_up=False)
    world.settle()
    model = world.models["digits"]
    assert (model.state, model.digest) == (ModelState.FAILED, two_releases[1].digest)


def test_only_the_model_that_was_switched_lately_is_blamed(world: World) -> None:
    old = world.controller.add(make_release({"m": data(1, 1)}, name="old"))
    young = [world.controller.add(make_release({"m": data(n, 1)}, name="young", version=str(n))) for n in (2, 3)]
    world.connect()
    for version, release in enumerate(young, start=1):
        world.desire(version, old, release, names=("old", "young"))
        world.settle()
        if version == 1:
            world.tick(700.0)
    died(world, 3)
    world.settle()
    serving(world, old, "old")
    assert world.models["young"].digest == young[0].digest
