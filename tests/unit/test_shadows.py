"""A shadow is fetched, proved, run and ended as the desired state says, and what it answers is compared in bounds."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.bundles import make_bundle, samples
from tests.support.installed import install
from tests.support.update_world import Release, World, make_release, serving
from tests.support.waiting import wait_for

from kedge_agent import Model
from kedge_agent.frame_sockets import FrameListener
from kedge_agent.shadow import process
from kedge_agent.shadow.comparing import MAX_CLASSES, Figures
from kedge_agent.shadow.runner import ShadowLimits, ShadowRunner, merged
from kedge_agent.update import actions, events
from kedge_protocol import codec, frames
from kedge_protocol.bundle import config as cfg
from kedge_protocol.errors import InputError
from kedge_protocol.frames import Call
from kedge_protocol.messages import Desired, ModelState, Shadow

pytestmark = pytest.mark.device

A, B = "sha256:" + "a" * 64, "sha256:" + "b" * 64


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    made.connect()
    return made


def released(world: World, version: str) -> Release:
    return world.controller.add(make_release({"model.bin": version.encode() * 5000}, version=version))


def desire(world: World, number: int, own: Release, shadow: Release | None, **options: float) -> None:
    shadows = {} if shadow is None else {"digits": Shadow(digest=shadow.digest, size=shadow.size)}
    shadows = {name: replace(one, **options) for name, one in shadows.items()}  # type: ignore[arg-type]
    desired = Desired(version=number, models={"digits": own.digest}, sizes={own.digest: own.size}, shadows=shadows)
    world.post(events.DesiredArrived(codec.encode(desired)))


def settle(world: World) -> None:
    for _ in range(500):
        if not (world.disk.run_one() or world.prover.run_one() or world.serve_request() or world.deliver()):
            world.tick(1.0)
            if world.machine.settled and not world.requests and not world.disk.waiting:
                break
    for _ in range(500):
        if not (world.disk.run_one() or world.prover.run_one() or world.serve_request() or world.deliver()):
            break


def told(world: World) -> list[object]:
    return [one for one in world.log if isinstance(one, (actions.StartShadow, actions.StopShadow))]


def test_a_shadow_is_pulled_and_proved_beside_the_model_that_serves_on(world: World) -> None:
    own, new = released(world, "1.0"), released(world, "2.0")
    desire(world, 1, own, new, share=0.2, memory_bytes=1 << 20)
    settle(world)
    serving(world, own)
    shadow = world.models["digits"].shadow
    assert shadow is not None
    assert (shadow.digest, shadow.state) == (new.digest, ModelState.SERVING)
    proofs = [one for one in world.log if isinstance(one, actions.Prove)]
    assert [(one.bundle.digest, one.beside) for one in proofs] == [(own.digest, False), (new.digest, True)]
    start = actions.StartShadow(model="digits", digest=new.digest, beside=own.digest, share=0.2, memory_bytes=1 << 20)
    assert told(world) == [start]
    # Cleaning up leaves its files alone.
    world.post(events.Tick())
    settle(world)
    assert world.folder().slot(new.digest).folder.is_dir()
    desire(world, 2, own, None)
    settle(world)
    assert told(world) == [start, actions.StopShadow("digits")]
    assert world.models["digits"].shadow is None


def test_what_was_a_shadow_is_promoted_without_pulling_it_again(world: World) -> None:
    own, new = released(world, "1.0"), released(world, "2.0")
    desire(world, 1, own, new)
    settle(world)
    before = dict(world.controller.served)
    desire(world, 2, new, None)
    settle(world)
    serving(world, new)
    assert world.controller.served == before


def test_a_shadow_that_fails_its_proof_or_ends_is_reported_and_hurts_nobody(world: World) -> None:
    own, bad, dying = released(world, "1.0"), released(world, "2.0"), released(world, "3.0")
    world.proof_fails.add("2.0")
    desire(world, 1, own, bad)
    settle(world)
    serving(world, own)
    shadow = world.models["digits"].shadow
    assert shadow is not None
    assert shadow.state is ModelState.FAILED
    assert "golden vectors do not hold" in (shadow.detail or "")
    assert told(world) == []
    desire(world, 2, own, dying)
    settle(world)
    world.post(events.ShadowEnded("digits", bad.digest, "late word of another"))
    assert world.models["digits"].shadow.state is ModelState.SERVING  # type: ignore[union-attr]
    world.post(events.ShadowEnded("digits", dying.digest, "it took too much"))
    shadow = world.models["digits"].shadow
    assert shadow is not None
    assert (shadow.state, shadow.detail) == (ModelState.FAILED, "shadow: it took too much")
    serving(world, own)


def test_a_shadow_runs_again_after_a_restart(world: World) -> None:
    own, new = released(world, "1.0"), released(world, "2.0")
    desire(world, 1, own, new)
    settle(world)
    world.crash()
    world.connect()
    settle(world)
    assert [type(one) for one in told(world)] == [actions.StartShadow, actions.StartShadow]
    serving(world, own)


@pytest.mark.parametrize(
    ("name", "shadow"),
    [
        ("a/b", Shadow(digest=B, size=1)),
        ("digits", Shadow(digest="sha256:no", size=1)),
        ("digits", Shadow(digest=B, size=0)),
        ("digits", Shadow(digest=B, size=1, share=0.0)),
        ("digits", Shadow(digest=B, size=1, share=1.5)),
        ("digits", Shadow(digest=B, size=1, memory_bytes=0)),
        ("digits", Shadow(digest=A, size=1)),
        ("other", Shadow(digest=B, size=1)),
    ],
)
def test_a_shadow_that_is_none_refuses_the_desired_state(world: World, name: str, shadow: Shadow) -> None:
    desired = Desired(version=1, models={"digits": A}, sizes={A: 1}, shadows={name: shadow})
    world.post(events.DesiredArrived(codec.encode(desired)))
    assert world.machine.desired_version == 0
    assert world.machine.desired_states.problem is not None


def test_states_with_other_shadows_have_other_content() -> None:
    plain = Desired(version=1, models={"digits": A}, sizes={})
    one = replace(plain, shadows={"digits": Shadow(digest=B, size=1)})
    assert plain.content != one.content


def test_a_frame_comes_out_as_it_went_in_and_what_is_none_is_refused() -> None:
    call = Call(
        digest=A,
        nanoseconds=1234,
        inputs={"x": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.array(3), "t": np.array(["naïve", ""])},
        outputs={"y": np.array([[True, False]])},
    )
    raw = frames.encode(call)
    assert raw is not None
    head, body = frames.LENGTH.unpack(raw[: frames.LENGTH.size])
    rest = raw[frames.LENGTH.size :]
    read = frames.decode(rest[:head], rest[head:])
    assert (read.digest, read.nanoseconds, len(rest)) == (A, 1234, head + body)
    for before, after in ((call.inputs, read.inputs), (call.outputs, read.outputs)):
        assert list(before) == list(after)
        for name in before:
            np.testing.assert_array_equal(before[name], after[name])
    for broken in (b"", b"{}", b'{"digest":"a","ns":1,"in":[["x","<f4",[-1]]],"out":[]}',
                   b'{"digest":"a","ns":1,"in":[["x","O",[1]]],"out":[]}', b"\xff"):  # fmt: skip
        with pytest.raises(InputError):
            frames.decode(broken, b"1234")
    assert frames.encode(replace(call, inputs={"x": np.array(["text"], object)})) is None


def spec(name: str, classes: int) -> cfg.TensorSpec:
    file = cfg.FileTensor(name=name, index=0, shape=(None, classes), dtype="float32")
    return cfg.TensorSpec(name=name, shape=(None, classes), dtype="float32", file=file)


@settings(max_examples=50, deadline=None)
@given(old=st.lists(st.integers(0, 4), min_size=1, max_size=30), seed=st.integers(0, 99))
def test_agreement_is_counted_by_the_class_of_the_old_answer(old: list[int], seed: int) -> None:
    new = np.random.default_rng(seed).integers(0, 5, len(old)).tolist()
    scores = np.eye(5, dtype=np.float32)
    figures = Figures()
    figures.add([spec("y", 5)], {"y": scores[old]}, {"y": scores[new]})
    message = figures.message(A)
    assert (message.compared, message.agreed) == (len(old), sum(a == b for a, b in zip(old, new, strict=True)))
    for number in set(old):
        pairs = [a == b for a, b in zip(old, new, strict=True) if a == number]
        assert message.classes[str(number)] == (len(pairs), sum(pairs))
    assert message.confidence_shift == 0.0
    twice = merged(A, [message, message])
    assert (twice.compared, twice.classes) == (
        2 * message.compared, {name: (2 * a, 2 * b) for name, (a, b) in message.classes.items()})  # fmt: skip


def test_what_is_counted_stays_in_bounds_and_numbers_may_differ_a_little() -> None:
    figures = Figures()
    scores = np.eye(1000, dtype=np.float32)
    figures.add([spec("y", 1000)], {"y": scores}, {"y": scores})
    assert len(figures.message(A).classes) == MAX_CLASSES + 1
    assert sum(counts[0] for counts in figures.message(A).classes.values()) == 1000
    numbers = Figures()
    before = np.full((2, 1), 10.0, np.float32)
    numbers.add([spec("y", 1)], {"y": before}, {"y": before + np.array([[0.5], [5.0]], np.float32)})
    assert (numbers.compared, numbers.agreed, numbers.classes) == (2, 1, {})


@pytest.mark.parametrize(
    ("old", "new", "alike"),
    [
        (np.array([[50], [50]]), np.array([[50], [52]]), [True, False]),
        (np.array([50, 50]), np.array([50, 52]), [True, False]),
        (np.array(["cat", "dog"]), np.array(["cat", "cat"]), [True, False]),
        (np.array([[True], [True]]), np.array([[True], [False]]), [True, False]),
        (np.array([[0.001], [0.4]], np.float32), np.array([[0.002], [0.6]], np.float32), [True, False]),
        (np.array([0.001, 0.4], np.float32), np.array([0.002, 0.6], np.float32), [True, False]),
        (np.array([[0.5], [20.0]], np.float32), np.array([[1.4], [21.0]], np.float32), [False, True]),
        (
            np.zeros((2, 10, 10), np.int64),
            np.stack([np.eye(10, dtype=np.int64), np.tri(10, dtype=np.int64)]),
            [True, False],
        ),
    ],
)
def test_integers_and_texts_are_classes_and_a_probability_is_compared_as_it_is(
    old: npt.NDArray[Any], new: npt.NDArray[Any], alike: list[bool]
) -> None:
    found = Figures().add([spec("y", 1)], {"y": old}, {"y": new})
    assert found is not None
    assert found.tolist() == alike


class _Posted(list[events.Event]):
    """What a runner posted."""


def _until(runner: ShadowRunner, condition: Callable[[], object]) -> None:
    def there() -> bool:
        runner.poll()
        return bool(condition())

    wait_for(there)


def _installed(tmp_path: Path) -> tuple[Path, str, str]:
    """A state folder with the current bundle 1.0 and an assembled 2.0 with another head; their digests."""
    state = tmp_path / ("a-folder-with-a-long-name-" * 4)
    new = install(state, make_bundle(tmp_path, "tiny", "2.0", head_seed=3)).current()
    folder = install(state, make_bundle(tmp_path, "tiny", "1.0"))
    current = folder.current()
    assert new is not None
    assert current is not None
    return state, current.digest, new.digest


def test_a_real_shadow_answers_the_live_calls_of_another_process_beside_it(tmp_path: Path) -> None:
    state, own, new = _installed(tmp_path)
    posted = _Posted()
    runner = ShadowRunner(state, ShadowLimits(), post=posted.append)
    wanted = actions.StartShadow(model="tiny", digest=new, beside=own, share=0.2, memory_bytes=1 << 30)
    runner.apply(wanted)
    inputs, chance = samples(16), np.random.default_rng(7)
    compared = agreed = 0
    with Model("tiny", state=state) as model:

        def enough() -> bool:
            nonlocal compared, agreed
            # In another order each time: else a look that is due after a pause sees the same rows again and again.
            order = chance.permutation(len(inputs))
            model(inputs[order[:8]])
            model(inputs[order[8]])
            taken = runner.take("tiny")
            if taken is not None:
                compared, agreed = compared + taken.compared, agreed + taken.agreed
                assert taken.digest == new
                assert taken.errors == 0
            return compared > 20

        _until(runner, enough)
    # The other head answers some of the same samples otherwise.
    assert 0 < agreed < compared
    assert posted == []
    pid = runner._running["tiny"].process.pid
    assert Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[16] == "19"
    runner.apply(actions.StopShadow("tiny"))
    runner.poll()
    assert runner.take("tiny") is None
    assert not Path(f"/proc/{pid}").exists()
    assert not list(state.glob("models/tiny/shadow.sock"))
    runner.close()


@pytest.mark.parametrize(
    ("limits", "memory_bytes", "words"),
    [
        (ShadowLimits(), 1 << 20, "took more than 1 MiB"),
        (ShadowLimits(memory_bytes=2 << 20), 1 << 30, "took more than 2 MiB"),
        (ShadowLimits(share=0.0), 1 << 30, "allows no shadows"),
    ],
)
def test_a_shadow_that_takes_more_than_it_may_is_ended_and_not_started_again(
    tmp_path: Path, limits: ShadowLimits, memory_bytes: int, words: str
) -> None:
    state, own, new = _installed(tmp_path)
    posted = _Posted()
    runner = ShadowRunner(state, limits, post=posted.append)
    runner.apply(actions.StartShadow(model="tiny", digest=new, beside=own, share=0.2, memory_bytes=memory_bytes))
    _until(runner, lambda: posted)
    (event,) = posted
    assert isinstance(event, events.ShadowEnded)
    assert words in event.reason
    for _ in range(5):
        runner.poll()
    assert runner._running == {}
    assert len(posted) == 1


def test_a_shadow_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    state, own, new = _installed(tmp_path)
    (folder,) = [one for one in state.glob("models/tiny/slots/*") if one.name.startswith(new.partition(":")[2][:16])]
    (folder / "config.json").write_text("{}", encoding="utf-8")
    posted = _Posted()
    runner = ShadowRunner(state, ShadowLimits(), post=posted.append)
    runner.apply(actions.StartShadow(model="tiny", digest=new, beside=own, share=0.2, memory_bytes=1 << 30))
    _until(runner, lambda: posted)
    (event,) = posted
    assert isinstance(event, events.ShadowEnded)
    assert "ended with status 1" in event.reason
    runner.close()


def test_rubbish_on_its_socket_ends_the_connection_and_nothing_else(tmp_path: Path) -> None:
    state, own, _ = _installed(tmp_path)
    shadow = process.ShadowProcess(process.load(next(state.glob("models/tiny/slots/*"))), beside=own, share=1.0)
    path = state / "s.sock"
    listening = FrameListener(path)
    threading.Thread(target=shadow.run, args=(listening,), daemon=True).start()
    for rubbish in (b"", b"abc", frames.LENGTH.pack(5, 0) + b"hello", frames.LENGTH.pack(1 << 30, 1)):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link, frames.address(path) as address:
            link.connect(address)
            link.sendall(rubbish)
            link.shutdown(socket.SHUT_WR)
            link.settimeout(60.0)
            with contextlib.suppress(ConnectionResetError):  # it was closed with bytes unread
                assert link.recv(1) == b""
