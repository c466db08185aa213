"""Samples are chosen within bounds, survive a restart, and arrive whole whatever is lost on the way; nothing leaves a
device that does not allow it."""

from __future__ import annotations

import contextlib
import hashlib
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.support.bundles import make_bundle, samples
from tests.support.installed import install
from tests.support.waiting import wait_for

from kedge_agent import Model
from kedge_agent.frame_sockets import FrameSender
from kedge_agent.samples import single
from kedge_agent.samples.collection import SILENCE_SECONDS, Collection
from kedge_agent.samples.reservoir import RANKS, Reservoir
from kedge_agent.samples.runner import SampleLimits, SampleRunner
from kedge_agent.shadow.runner import ShadowLimits, ShadowRunner
from kedge_agent.update import events
from kedge_protocol import frames
from kedge_protocol.errors import MessageError
from kedge_protocol.frames import Call
from kedge_protocol.messages import Desired
from kedge_protocol.samples import CHUNK_BYTES, Choice, SampleChunk, SampleRequest, SampleState, decode_chunk

pytestmark = pytest.mark.device

A = "sha256:" + "a" * 64


def asked(**changed: object) -> SampleRequest:
    request = SampleRequest(rid="0123456789abcdef", where=Choice.LOW_CONFIDENCE, count=5, max_bytes=1 << 20, seconds=9)
    return replace(request, **changed)  # type: ignore[arg-type]


def frame(number: int, confidence: float, *, size: int = 4) -> tuple[bytes, bytes]:
    inputs = np.full((1, size), number, np.float32)
    outputs = np.array([[confidence, 1 - confidence]], np.float32)
    call = Call(digest=A, nanoseconds=1, inputs={"x": inputs}, outputs={"y": outputs}, confidence=confidence)
    raw = frames.encode(call)
    assert raw is not None
    return frames.split(raw)[0]


def numbers(raw: bytes) -> list[int]:
    return [int(frames.decode(*one).inputs["x"][0, 0]) for one in frames.split(raw)]


def test_the_reservoir_keeps_the_smallest_ranks_none_twice_and_no_byte_more_than_it_may(tmp_path: Path) -> None:
    kept = Reservoir(tmp_path, count=3, size=1 << 20)
    for number in random.Random(1).sample(range(100), 100):
        head, body = frame(number, 0.5)
        kept.offer(number, body[:16], head, body)
        assert not kept.offer(number + 1, body[:16], head, body)
    assert numbers(b"".join(kept.frames())) == [0, 1, 2]
    # As after a restart, with a smaller bound on bytes.
    head, body = frame(7, 0.5)
    again = Reservoir(tmp_path, count=3, size=kept.size)
    assert not again.offer(7, body[:16], head, body)
    large = frame(500, 0.5, size=60)
    assert again.offer(0, large[1][:240], *large)
    assert again.size <= kept.size + 0
    assert len(again) < 3


def test_what_disagrees_is_kept_with_equal_probability(tmp_path: Path) -> None:
    chance = random.Random(3)
    found = np.zeros(20)
    for turn in range(150):
        kept = Reservoir(tmp_path / str(turn), count=5, size=1 << 20)
        for number in range(20):
            head, body = frame(number, 0.5)
            kept.offer(chance.randrange(RANKS), body[:16], head, body)
        found[numbers(b"".join(kept.frames()))] += 1
    # 150 turns, a quarter each: 37.5 with a standard deviation of 5.3.
    assert found.min() > 15
    assert found.max() < 60


def collected(folder: Path, shown: int = 30, **changed: object) -> Collection:
    made = Collection(folder, asked(**changed), detail=None, now=0.0)
    for number in range(shown):
        made.show(*frame(number, 0.3 + number / 100, size=4000))
    return made


def test_a_request_goes_on_after_a_restart_where_it_was(tmp_path: Path) -> None:
    collected(tmp_path, seconds=30.0).tick(15.0)
    made = Collection(tmp_path, asked(seconds=30.0), detail=None, now=1000.0)
    assert made.reported().kept == 5
    assert not made.tick(1014.0)
    made.show(*frame(99, 0.01, size=4000))
    assert made.tick(1015.1)
    assert made.finish() > 0
    assert made.state is SampleState.SENDING
    sending = Collection(tmp_path, asked(seconds=30.0), detail=None, now=5.0)
    received = bytearray()
    _deliver(sending, received, random.Random(0), loss=0.0)
    assert numbers(bytes(received)) == [99, 0, 1, 2, 3]
    # Once it is done it is done, and another request begins anew.
    assert Collection(tmp_path, asked(), detail=None, now=9.0).state is SampleState.DONE
    other = Collection(tmp_path, asked(rid="f" * 16), detail=None, now=9.0)
    assert (other.state, other.reported().kept) == (SampleState.COLLECTING, 0)


def _deliver(made: Collection, received: bytearray, chance: random.Random, *, loss: float) -> None:
    """A link that loses and doubles, and a controller that appends what continues its file."""
    now = 0.0
    while made.state is SampleState.SENDING:
        for chunk in list(made.chunks(now)):
            for _ in range(2 if chance.random() < loss else 1):
                if chance.random() < loss:
                    continue
                read = decode_chunk(chunk.encode(), where="test")
                assert read == chunk
                if read.offset == len(received):
                    received += read.payload
                if chance.random() >= loss:
                    made.answered(len(received))
        now += 0.25
        assert now < 5000
    assert hashlib.sha256(received).digest() == chunk.checksum


@pytest.mark.parametrize("loss", [0.0, 0.1, 0.4])
def test_whatever_is_lost_or_doubled_the_file_arrives_whole(tmp_path: Path, loss: float) -> None:
    made = collected(tmp_path, 40)
    made.tick(10.0)
    assert made.finish() > CHUNK_BYTES
    received = bytearray()
    _deliver(made, received, random.Random(5), loss=loss)
    assert numbers(bytes(received)) == [0, 1, 2, 3, 4]
    assert not (tmp_path / "outbox").exists()


def test_without_answers_nothing_floods_the_link(tmp_path: Path) -> None:
    made = collected(tmp_path, 60, count=60, max_bytes=8 << 20)
    made.tick(10.0)
    made.finish()
    sent = sum(len(list(made.chunks(0.25 * turn))) for turn in range(4 * 60))
    assert sent <= 4 * (60 / SILENCE_SECONDS + 1)


def test_a_sample_above_the_wanted_confidence_or_on_which_all_agree_is_not_kept(tmp_path: Path) -> None:
    made = collected(tmp_path, 30, below=0.32)
    assert made.reported().kept == 2
    assert made.reported().seen == 30
    agreed = collected(tmp_path, 30, rid="e" * 16, where=Choice.DISAGREE)
    assert agreed.reported().kept == 0


@pytest.mark.parametrize("raw", [b"", b"KSM1", b"x" * 500, b"KSM1" + b"g" * 16 + b"\0" * 48 + b"1"])
def test_what_is_no_chunk_is_refused(raw: bytes) -> None:
    with pytest.raises(MessageError):
        decode_chunk(raw, where="test")


def test_the_least_sure_sample_of_a_batch_is_taken_whatever_the_axes(tmp_path: Path) -> None:
    slot = install(tmp_path / "state", make_bundle(tmp_path, "tiny", "1.0")).current()
    assert slot is not None
    config = slot.bundle().config
    shape = [axis or 6 for axis in config.inputs[0].shape]
    inputs = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    classes = config.outputs[0].shape[1]
    scores = np.full((shape[0], classes or 4), 0.0, np.float32)
    scores[:, 0] = [5, 4, 0.1, 3, 2, 9][: shape[0]]
    call = Call(
        digest=A, nanoseconds=1, inputs={config.inputs[0].name: inputs}, outputs={config.outputs[0].name: scores}
    )
    found = single.least_sure(call, config)
    assert found is not None
    assert np.array_equal(found.inputs[config.inputs[0].name], inputs[2:3])
    only = Call(
        digest=A, nanoseconds=1, inputs={config.inputs[0].name: inputs[0]}, outputs={config.outputs[0].name: scores[0]}
    )
    found = single.least_sure(only, config)
    assert found is not None
    assert np.array_equal(found.inputs[config.inputs[0].name], inputs[:1])


class Device:
    """An installed model, its runner, and the chunks that it sent."""

    def __init__(self, folder: Path, limits: SampleLimits, *, signed: bool = True, previous: bool = False) -> None:
        self.state = folder / "state"
        if previous:
            install(self.state, make_bundle(folder, "tiny", "0.9", head_seed=3))
        install(self.state, make_bundle(folder, "tiny", "1.0"))
        self.sent: list[SampleChunk] = []
        self.now = 0.0
        self.shadows = ShadowRunner(self.state, ShadowLimits(), post=self._ended)
        self.runner = SampleRunner(
            self.state, limits, signed=signed, send=self.sent.append, shadow=self.shadows.apply, clock=lambda: 1e9
        )

    def _ended(self, event: events.Event) -> None:
        assert isinstance(event, events.ShadowEnded)
        self.runner.shadow_ended(event)

    def poll(self, request: SampleRequest | None, seconds: float = 0.0) -> None:
        self.now += seconds
        wanted = {} if request is None else {"tiny": request}
        desired = Desired(version=1, models={"tiny": A}, sizes={A: 1}, samples=wanted)
        self.runner.poll(self.now, desired, ready=True)
        self.shadows.poll()

    @contextlib.contextmanager
    def calls(self, request: SampleRequest, enough: int) -> Iterator[None]:
        """Call the model until so many samples are kept."""
        inputs, end = samples(64), time.monotonic() + 120
        # A look is at most one in some milliseconds: in the same order it would always see the first call of a round.
        random = np.random.default_rng(0)
        with Model("tiny", state=self.state) as model:
            while self.runner.reported()["tiny"].kept < enough:
                assert time.monotonic() < end, self.runner.reported()
                self.poll(request)
                for place in random.permutation(len(inputs)):
                    model(inputs[place : place + 1])
                time.sleep(0.02)
        yield


@pytest.mark.parametrize(
    ("limits", "signed", "changed", "words"),
    [
        (SampleLimits(), True, {}, "[samples] allow"),
        (SampleLimits(allow=True), False, {}, "[trust]"),
        (SampleLimits(allow=True), True, {"where": Choice.DISAGREE}, "nothing to disagree with"),
        (SampleLimits(allow=True, bytes_per_day=0), True, {}, "mib_per_day"),
    ],
)
def test_a_device_that_does_not_send_samples_says_why_and_listens_to_nobody(
    tmp_path: Path, limits: SampleLimits, signed: bool, changed: dict[str, object], words: str
) -> None:
    device = Device(tmp_path, limits, signed=signed)
    request = asked(**changed)
    device.poll(request)
    told = device.runner.reported()["tiny"]
    assert told.state is SampleState.REFUSED
    assert words in (told.detail or "")
    device.poll(request, 100.0)
    assert not list(device.state.glob("models/tiny/*.sock"))
    assert device.sent == []
    device.poll(None)
    assert device.runner.reported() == {}


def test_a_frame_that_is_larger_than_what_may_be_kept_is_not_read(tmp_path: Path) -> None:
    device = Device(tmp_path, SampleLimits(allow=True))
    stale = device.state / "models" / "tiny" / "disagree.sock"
    stale.touch()
    request = asked(seconds=1000.0, max_bytes=2000)
    device.poll(request)
    assert not stale.exists()
    sender = FrameSender(device.state / "models" / "tiny" / "low-confidence.sock")
    for size in (10_000, 40):
        head, body = frame(size, 0.5, size=size)
        sender.send(frames.LENGTH.pack(len(head), len(body)) + head + body)
        sender.close()
    wait_for(lambda: device.runner.reported()["tiny"].kept)
    told = device.runner.reported()["tiny"]
    assert (told.seen, told.kept) == (1, 1)
    assert told.size < 2000
    device.poll(None)
    device.runner.close()


@pytest.mark.parametrize("where", list(Choice))
def test_live_calls_become_samples_within_the_devices_own_bounds(tmp_path: Path, where: Choice) -> None:
    limits = SampleLimits(allow=True, count=3, bytes_per_day=1 << 20)
    device = Device(tmp_path, limits, previous=True)
    request = asked(where=where, count=50, seconds=1000.0)
    device.poll(request)
    device.poll(request)
    with device.calls(request, 3):
        assert "at most 3 samples" in (device.runner.reported()["tiny"].detail or "")
    device.poll(request, 1001.0)
    device.poll(request)
    told = device.runner.reported()["tiny"]
    assert (told.state, told.kept) == (SampleState.SENDING, 3)
    (chunk,) = device.sent
    found = [frames.decode(*one) for one in frames.split(chunk.payload)]
    assert len(found) == 3
    assert all(one.disagrees == (where is Choice.DISAGREE) for one in found)
    device.runner.answered(request.rid, chunk.total)
    assert device.runner.reported()["tiny"].state is SampleState.DONE
    # A further request counts against the same day, and one that is taken back leaves nothing.
    device.runner._limits = replace(limits, bytes_per_day=chunk.total)
    device.poll(asked(rid="d" * 16))
    assert "share of today" in (device.runner.reported()["tiny"].detail or "")
    device.poll(None)
    assert [path.name for path in device.state.glob("samples/*")] == ["sent.json"]
    device.shadows.close()
    device.runner.close()
