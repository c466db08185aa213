"""A fleet in virtual time: the real service, database, inbox and engine, and devices that answer as they are told to.

Messages go the way of the controller: its publications are read as a device reads them, and reports come through the
inbox.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from kedge.fleet import assigning
from kedge.fleet.controller_store import ControllerStore
from kedge.fleet.inbox import Inbox
from kedge.fleet.results import RolloutStatus, StageView
from kedge.fleet.service import FleetService
from kedge.fleet.staged.engine import Engine
from kedge_protocol import codec, topics
from kedge_protocol.bundle.layout import Layout
from kedge_protocol.candidates import Candidate, choose
from kedge_protocol.messages import (
    Desired,
    Failure,
    Latency,
    ModelState,
    ModelTelemetry,
    Reported,
    ReportedCandidate,
    ReportedModel,
    ShadowTelemetry,
    Status,
    Telemetry,
    decode_desired,
)
from tests.support.bundles import make_bundle

START = 1_800_000_000.0
"""When the virtual time begins: a Friday, 8:00 UTC."""
TARGETS = ("rpi4", "rpi5", "generic-cpu")


def layouts(folder: Path, targets: Iterable[str] = TARGETS) -> dict[str, Path]:
    """Releases 1.0, 2.0 and 3.0 of the model ``tiny``."""
    names = list(targets)
    return {
        version: make_bundle(folder, version=version, target=names, head_seed=seed)
        for version, seed in (("1.0", None), ("2.0", 1), ("3.0", 2))
    }


@dataclass
class Device:
    """A device that answers.

    Attributes:
        fails: bundle → the stages at which it fails, one a try; the last for ever.
        deaf: it hears and says nothing.
        seconds: from being told to serving; it reports progress meanwhile.
        takes: bundle → milliseconds of a call, where it measures candidates.
        measures: whether its agent knows candidates.
        disagrees: of 50 inputs, those that a shadow answers otherwise; None where it measures nothing.
        told: the desired versions that it took, with the model's bundle.
    """

    name: str
    target: str
    fails: dict[str, list[str]] = field(default_factory=dict)
    deaf: bool = False
    seconds: float = 0.0
    takes: dict[str, float] = field(default_factory=dict)
    measures: bool = True
    disagrees: int | None = None
    agent: str = "0.4"
    told: list[tuple[int, str | None]] = field(default_factory=list)
    serving: str | None = None
    desired: Desired | None = None
    since: float = 0.0
    measured_at: float = 0.0
    seq: int = 0
    failure: Failure | None = None
    candidates: tuple[ReportedCandidate, ...] = ()
    tried: bool = False
    first: Desired | None = None

    @property
    def wanted(self) -> str | None:
        """The bundle that it shall run: of two candidates the one that it kept, before that the first."""
        kept = next((one.digest for one in self.candidates if one.kept), None)
        return kept or (None if self.desired is None else self.desired.models.get("tiny"))

    @property
    def is_trying(self) -> bool:
        """Whether it has two candidates, and has not tried them."""
        return self.measures and not self.candidates and self.desired is not None and bool(self.desired.rivals)

    def take(self, desired: Desired, now: float) -> None:
        """Take a desired state, as an agent does: only a newer one."""
        if self.deaf or (self.desired is not None and desired.version <= self.desired.version):
            return
        is_asked_again = self.desired is None or desired.order("tiny") != self.desired.order("tiny")
        self.desired, self.since = desired, now
        if is_asked_again:
            self.failure, self.candidates = None, ()
        self.told.append((desired.version, self.wanted))

    def answer(self, now: float) -> Reported | None:
        """What it reports now."""
        if self.deaf:
            return None
        if (
            (self.wanted != self.serving or self.is_trying)
            and self.failure is None
            and now - self.since >= self.seconds
        ):
            self._finish()
        self.seq += 1
        return Reported(
            boot_id=f"boot-{self.name}",
            seq=self.seq,
            target=self.target,
            agent_version=self.agent,
            architecture="aarch64",
            python="3.11",
            runtimes={"onnxruntime": "1.20.1"},
            free_bytes=1 << 30,
            desired_version=0 if self.desired is None else self.desired.version,
            models=self._models(now),
        )

    def telemetry(self, now: float) -> Telemetry | None:
        """What it sends each half minute while a shadow runs."""
        shadow = None if self.desired is None or self.deaf else self.desired.shadows.get("tiny")
        if shadow is None or self.disagrees is None or now - self.measured_at < 30:
            return None
        self.measured_at = now
        self.seq += 1
        agreed = 50 - self.disagrees
        seen = ShadowTelemetry(digest=shadow.digest, compared=50, agreed=agreed, classes={"cat": (50, agreed)})
        model = ModelTelemetry(
            digest=self.serving, inferences=500, errors=0, inferences_total=500, errors_total=0, shadow=seen
        )
        return Telemetry(
            boot_id=f"boot-{self.name}",
            seq=self.seq,
            interval=30.0,
            models={"tiny": model},
            cpu_percent=1.0,
            memory_total_bytes=1 << 30,
            memory_available_bytes=1 << 29,
            agent_bytes=1 << 24,
            free_bytes=1 << 30,
        )

    def _try(self, desired: Desired) -> None:
        """Prove and measure two candidates, by the agent's own rule."""
        self.tried, self.first = True, desired
        pair = desired.pair("tiny") or ("", "")
        failures = {one: self.fails[one][0] for one in pair if self.fails.get(one)}
        kept = choose(
            [
                Candidate(size=1, p50_ms=(p := self.takes.get(one, 5.0)), p95_ms=p, failed=one in failures)
                for one in pair
            ]
        )
        self.candidates = tuple(
            ReportedCandidate(
                digest=one,
                latency=None if one in failures else latency(one, self.takes.get(one, 5.0)),
                failure=Failure(digest=one, stage=failures[one], reason="as the test says")
                if one in failures
                else None,
                kept=kept is not None and pair[kept] == one,
            )
            for one in pair
        )
        if kept is None:
            self.failure = self.candidates[0].failure
        else:
            self.serving = pair[kept]

    def _finish(self) -> None:
        if self.is_trying and self.desired is not None:
            self._try(self.desired)
            return
        stages = self.fails.get(self.wanted or "", [])
        if not stages:
            self.serving = self.wanted
            return
        stage = stages.pop(0) if len(stages) > 1 else stages[0]
        if stage == "ok":
            self.serving = self.wanted
        else:
            self.failure = Failure(digest=self.wanted or "", stage=stage, reason="as the test says")

    def _models(self, now: float) -> dict[str, ReportedModel]:
        if self.wanted is None and self.serving is None:
            return {}
        state, done = ModelState.SERVING, 0
        if self.failure is not None:
            state = ModelState.FAILED
        elif self.wanted != self.serving or self.is_trying:
            state, done = ModelState.FETCHING, int(now - self.since)
        return {
            "tiny": ReportedModel(
                state=state,
                desired=self.wanted,
                digest=self.serving,
                version="x" if self.serving else None,
                proved=self.serving is not None,
                blocks_done=done,
                blocks_total=1000,
                failure=self.failure,
                candidates=self.candidates,
            )
        }


def latency(bundle: str, p50_ms: float) -> Latency:
    """What a device measured of a bundle."""
    return Latency(bundle=bundle, files=bundle, p50_ms=p50_ms, p95_ms=p50_ms, calls=10)


class StagedFleet:
    """The fleet and its devices; a context manager.

    Args:
        folder: for the state.
        published: the releases that are published, by version.
    """

    def __init__(self, folder: Path, published: Mapping[str, Path]) -> None:
        self.now = START
        self.service = FleetService(folder / "state", clock=lambda: self.now)
        for layout in published.values():
            self.service.publish(layout)
        self.digests = {
            (version, target): Layout(layout).bundle(target).digest
            for version, layout in published.items()
            for target in Layout(layout).release().bundles
        }
        self.devices: dict[str, Device] = {}
        self.listening_since = 0.0
        self._numbers: dict[str, int | None] = {}
        self._said: dict[str, tuple[int, dict[str, ReportedModel]]] = {}
        self.restart()

    def __enter__(self) -> StagedFleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.service.close()

    def restart(self) -> None:
        """Forget all that a controller holds in memory."""
        self._records = ControllerStore(self.service.database)
        self._inbox = Inbox(lambda: self.now)
        self._said.clear()
        self.engine = Engine(self.service.database)

    def add(self, count: int, target: str = "rpi4", *, prefix: str | None = None, labels: str = "{}") -> list[str]:
        """Register devices that were never told anything; return their names."""
        names = [f"{prefix or target}-{number:04}" for number in range(count)]
        with self.service.database.write() as session:
            session.run_many(
                "INSERT INTO device (name, target, labels, added_at, desired_version, managed, removed)"
                " VALUES (?, ?, ?, ?, 0, 0, 0)",
                [(name, target, labels, self.now) for name in names],
            )
        self.devices |= {name: Device(name, target) for name in names}
        return names

    def settle(self, version: str) -> None:
        """Let all devices run a version, by a plain rollout."""
        self.service.rollout_start(f"tiny:{version}")
        self.step(2)
        assert self.serving(version) == set(self.devices)
        for device in self.devices.values():
            device.told.clear()

    def digest(self, version: str, target: str = "rpi4") -> str:
        """The bundle of a version for a target."""
        return self.digests[version, target]

    def fail(self, version: str, names: Iterable[str], *stages: str) -> None:
        """Let a version fail on devices at these stages, one a try; ``ok`` is a try that succeeds."""
        for name in names:
            device = self.devices[name]
            device.fails[self.digest(version, device.target)] = list(stages)

    def serving(self, version: str) -> set[str]:
        """The devices that really serve a version."""
        return {one.name for one in self.devices.values() if one.serving == self.digest(version, one.target)}

    def step(self, seconds: int = 1, *, every: int = 1) -> None:
        """Let time go by: each round, devices take what is published, report, and the engine decides."""
        for _ in range(0, seconds, every):
            self.now += every
            self._exchange()
            self.tick()

    def hear(self, topic: str, payload: bytes) -> None:
        """Take a message of a device at the next step."""
        self._inbox.put(topic, payload, False)

    def tick(self) -> None:
        """Let the engine decide."""
        self.engine.tick(now=self.now, listening_since=self.listening_since)
        assigning.tick(self.service.database, self.now)

    def until(self, *phases: str, seconds: int = 2000, every: int = 10, rollout: int | None = None) -> StageView:
        """Let time go by until a rollout is in one of these phases; return where it stands."""
        for _ in range(0, seconds, every):
            stage = self.stage(rollout)
            if stage.phase.value in phases:
                return stage
            self.step(every, every=every)
        raise AssertionError(f"it is {replace(self.stage(rollout), gates=())}")

    def status(self, rollout: int | None = None) -> RolloutStatus:
        """The status of a rollout."""
        return self.service.rollout_status(rollout)

    def stage(self, rollout: int | None = None) -> StageView:
        """Where the latest staged rollout stands, or this one."""
        if rollout is None:
            with self.service.database.read() as session:
                rollout = session.value("SELECT max(rollout_id) FROM rollout_stage")
        stage = self.status(rollout).stage
        assert stage is not None
        return stage

    def actions(self, rollout: int) -> list[str]:
        """The actions of the audit log about a rollout, oldest first."""
        return [entry.action for entry in reversed(self.service.audit_log(subject=f"rollout {rollout}"))]

    def _exchange(self) -> None:
        snapshot = self._records.snapshot(known=self._inbox.known())
        self._inbox.know(snapshot.memories)
        due = [name for name, version in snapshot.versions.items() if version != self._numbers.get(name)]
        for publication in self._records.publications(due):
            if publication.payload:
                desired = decode_desired(publication.payload, where="desired")
                self.devices[publication.device].take(desired, self.now)
        for name, device in self.devices.items():
            self._numbers[name] = None if device.desired is None else device.desired.version
            self._report(name, device)
            if (telemetry := device.telemetry(self.now)) is not None:
                self._inbox.put(topics.telemetry(name, "metrics"), codec.encode(telemetry), False)
        self._records.write(self._inbox.digest())
        self._inbox.written()

    def _report(self, name: str, device: Device) -> None:
        reported = device.answer(self.now)
        if reported is None or (reported.desired_version, reported.models) == self._said.get(name):
            return
        self._said[name] = reported.desired_version, reported.models
        status = Status(online=True, boot_id=reported.boot_id, session=1)
        self._inbox.put(topics.status(name), codec.encode(status), True)
        self._inbox.put(topics.reported(name), codec.encode(reported), False)


def labels(**values: str) -> str:
    """Labels as they are stored."""
    return json.dumps(values)
