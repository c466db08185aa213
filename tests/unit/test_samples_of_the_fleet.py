"""Requests for samples on the controller's side: who is asked, what is taken in, and how they end."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.staged_fleet import StagedFleet, layouts

from kedge.fleet import sample_parts, samples
from kedge.fleet.devices import desired_state
from kedge.fleet.sample_intake import SampleIntake
from kedge.fleet.samples import SampleView
from kedge_protocol import codec, frames
from kedge_protocol.errors import ConfigError, FleetError
from kedge_protocol.frames import Call
from kedge_protocol.messages import Command, Reported
from kedge_protocol.samples import CHUNK_BYTES, Choice, ReportedSamples, SampleChunk, SampleRequest, SampleState

A = "sha256:" + "a" * 64


class _Answers:
    """Stands at the end of the wire: the answers, in their order."""

    def __init__(self) -> None:
        self.said: list[tuple[str, Command]] = []

    def publish(self, topic: str, payload: bytes, **_: object) -> bool:
        self.said.append((topic, codec.decode(payload, Command, where=topic)))
        return True


class Host:
    """A fleet of three devices with a model, and its intake."""

    def __init__(self, fleet: StagedFleet) -> None:
        self.fleet = fleet
        self.service = fleet.service
        self.answers = _Answers()
        self.intake = SampleIntake(self.service.state, self.service.database, self.answers)  # type: ignore[arg-type]

    def request(self, count: int = 4, **options: Any) -> SampleView:
        return samples.request(self.service, "tiny", Choice.LOW_CONFIDENCE, count, **options)

    def wanted(self, name: str) -> SampleRequest | None:
        with self.service.database.read() as session:
            row = session.row("SELECT id, desired_version FROM device WHERE name = ?", (name,))
            assert row is not None
            return desired_state(session, row["id"], row["desired_version"]).samples.get("tiny")

    def send(self, name: str, chunk: SampleChunk) -> int | None:
        """Let a chunk arrive; the bytes that the answer tells of, or None without one."""
        before = len(self.answers.said)
        self.intake.put(name, chunk.encode())
        self.intake.tick()
        return self.answers.said[-1][1].received if len(self.answers.said) > before else None

    def report(self, name: str, state: SampleState, **told: object) -> None:
        wanted = self.wanted(name)
        assert wanted is not None
        said = ReportedSamples(rid=wanted.rid, state=state, **told)  # type: ignore[arg-type]
        reported = Reported(
            boot_id="b", seq=1, target="rpi4", agent_version="1", architecture="x", python="3", runtimes={},
            free_bytes=0, desired_version=1, samples={"tiny": said},
        )  # fmt: skip
        with self.service.database.write() as session:
            number = session.value("SELECT id FROM device WHERE name = ?", (name,))
            sample_parts.note(session, number, reported)

    def parts(self, number: int = 1) -> dict[str, str]:
        return {part.device: part.state for part in samples.show(self.service, number)[0].parts}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return layouts(tmp_path_factory.mktemp("layouts"), ("rpi4",))


@pytest.fixture
def host(tmp_path: Path, published: dict[str, Path]) -> Iterator[Host]:
    with StagedFleet(tmp_path, published) as made:
        made.add(3, "rpi4")
        made.settle("1.0")
        yield Host(made)


def file_of(values: list[float], shape: tuple[int, ...] = (1, 20000)) -> bytes:
    found = b""
    for number, sure in enumerate(values):
        call = Call(
            digest=A, nanoseconds=1, inputs={"file": np.full(shape, number + sure, np.float32)},
            outputs={"y": np.array([[sure, 1 - sure]], np.float32)}, confidence=sure,
        )  # fmt: skip
        raw = frames.encode(call)
        assert raw is not None
        found += raw
    return found


def chunks(rid: str, raw: bytes, checksum: bytes | None = None) -> list[SampleChunk]:
    checksum = checksum or hashlib.sha256(raw).digest()
    return [
        SampleChunk(rid=rid, offset=at, total=len(raw), checksum=checksum, payload=raw[at : at + CHUNK_BYTES])
        for at in range(0, len(raw), CHUNK_BYTES)
    ]


def test_each_device_is_asked_for_its_part_by_its_signed_desired_state(host: Host) -> None:
    asked = host.request(4)
    for name in host.fleet.devices:
        wanted = host.wanted(name)
        assert wanted is not None
        assert (wanted.count, wanted.where) == (2, Choice.LOW_CONFIDENCE)
    assert asked.state == "open"
    with pytest.raises(FleetError, match="request 1 is under way there"):
        host.request()
    # Of many devices no more are asked than samples are wanted.
    samples.cancel(host.service, 1)
    assert all(host.wanted(name) is None for name in host.fleet.devices)
    few = host.request(2)
    assert len(few.parts) == 2
    assert list(few.skipped.values()) == ["others were drawn"]


@pytest.mark.parametrize(
    "options", [{"count": 0}, {"count": 10**6}, {"seconds": 0.0}, {"below": 1.5}, {"max_bytes": 0}]
)
def test_numbers_out_of_range_are_refused(host: Host, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        host.request(**options)
    assert samples.show(host.service) == ()


def test_chunks_become_a_data_set_whatever_comes_twice_or_out_of_order(host: Host, tmp_path: Path) -> None:
    rid = _rid(host, host.request(4))
    one, other, third = sorted(host.fleet.devices)
    first, second = file_of([0.9, 0.2]), file_of([0.5, 0.7])
    parts = chunks(rid, first)
    assert len(parts) > 2
    assert host.send(one, parts[1]) == 0
    assert host.send(one, parts[0]) == CHUNK_BYTES
    assert host.send(one, parts[0]) == CHUNK_BYTES
    # A controller that was started anew goes on with what is on its disk.
    host.intake = SampleIntake(host.service.state, host.service.database, host.answers)  # type: ignore[arg-type]
    answers = [host.send(one, part) for part in parts[1:]]
    assert answers[-1] == len(first)
    assert host.send(one, parts[-1]) == len(first)
    assert host.wanted(one) is None
    for part in chunks(rid, second):
        host.send(other, part)
    host.report(third, SampleState.REFUSED, detail="not here")
    assert host.parts() == {one: "done", other: "done", third: "refused"}
    assert samples.show(host.service, 1)[0].state == "ended"
    written = samples.export(host.service, 1, tmp_path / "hard.npz")
    with np.load(written.path) as data:
        # The least sure first; the input may have any name.
        assert np.allclose(data["file"][:, 0], [1.2, 0.5, 1.7, 0.9])
    assert (written.samples, written.left_out) == (4, 0)
    done = [entry.action for entry in reversed(host.service.audit_log()) if entry.subject == "samples 1"]
    assert done == ["samples.request", "samples.received", "samples.received", "samples.export"]
    samples.remove(host.service, 1)
    assert not list((host.service.state / "samples").iterdir())


def _rid(host: Host, view: SampleView) -> str:
    wanted = host.wanted(view.parts[0].device)
    assert wanted is not None
    return wanted.rid


def test_what_was_not_asked_for_is_not_written(host: Host) -> None:
    rid = _rid(host, host.request(3, max_bytes=100_000))
    one, other, third = sorted(host.fleet.devices)
    raw = file_of([0.5])
    assert host.send(one, chunks("f" * 16, raw)[0]) is None
    assert host.send("stranger", chunks(rid, raw)[0]) is None
    assert host.send(one, chunks(rid, file_of([0.1, 0.2, 0.3]))[0]) is None
    assert not (host.service.state / "samples").exists()
    # More samples than it was asked for, another checksum, and what is no frame.
    for name, content, checksum in (
        (one, file_of([0.1, 0.2], (1, 50)), None),
        (other, raw, b"\0" * 32),
        (third, b"rubbish" * 50, None),
    ):
        assert [host.send(name, part) for part in chunks(rid, content, checksum)][-1] == 0
    assert set(host.parts().values()) == {"failed"}
    assert samples.show(host.service, 1)[0].state == "ended"
    with pytest.raises(FleetError, match="nothing came home"):
        samples.export(host.service, 1, Path("nowhere.npz"))


def test_a_request_ends_though_devices_say_nothing(host: Host) -> None:
    asked = host.request(3, seconds=60.0)
    one, *_ = sorted(host.fleet.devices)
    host.report(one, SampleState.COLLECTING, seen=7, kept=2)
    assert host.parts()[one] == "collecting"
    host.fleet.now = asked.ends_at - 10
    host.intake.tick()
    assert samples.show(host.service, 1)[0].state == "open"
    host.fleet.now = asked.ends_at + 10
    host.intake.tick()
    assert set(host.parts().values()) == {"silent"}
    assert samples.show(host.service, 1)[0].state == "ended"
    assert all(host.wanted(name) is None for name in host.fleet.devices)


def test_a_device_that_found_none_is_done_with_none(host: Host) -> None:
    host.request(3)
    for name in host.fleet.devices:
        host.report(name, SampleState.DONE)
    assert set(host.parts().values()) == {"done"}
