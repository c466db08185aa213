"""The scenario of a simulation: a typed TOML document, checked before anything starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kedge.fleet.staged import policy as policies
from kedge.simulator.lies import Lie
from kedge_protocol import codec, toml
from kedge_protocol.errors import ConfigError
from kedge_protocol.topics import checked_name

MODEL = "model"
"""Name of the simulated model."""
MAX_DEVICES = 100_000
_REMEDY = "See docs/simulate.md for the form"


@dataclass(frozen=True, kw_only=True)
class Group:
    """Devices of one kind.

    Attributes:
        target: as in ``kedge device add --target``.
        count: number of devices; they are named ``TARGET-0001``, …, with ``site`` in front where groups share a target.
        labels: of each of them.
    """

    target: str
    count: int
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """How the old release behaves on a sound device, and how devices differ.

    Attributes:
        calls_per_minute: inferences of one device.
        errors: share of calls that fail.
        latency_ms: median of one call.
        spread: standard deviation of the logarithm of one device's latencies.
        between_devices: the same of the devices' medians.
        memory_mb: resident memory of the serving process.
        memory_noise_mb: standard deviation of what is measured of it.
        classes: number of classes of the model.
        agreement: share of inputs to which a sound new release gives the old one's answer.
        temperature_c: of a device at work.
        prove_seconds: what the golden vectors take.
        load_seconds: what the serving process takes to load a bundle.
    """

    calls_per_minute: float = 60.0
    errors: float = 0.002
    latency_ms: float = 12.0
    spread: float = 0.2
    between_devices: float = 0.1
    memory_mb: float = 120.0
    memory_noise_mb: float = 1.0
    classes: int = 10
    agreement: float = 0.99
    temperature_c: float = 52.0
    prove_seconds: float = 5.0
    load_seconds: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Defect:
    """What is wrong with a release on some targets.

    Attributes:
        targets: where; empty for all.
        backends: of a release with several bundles of a target, in which of them; empty for all.
        golden_vectors: they fail.
        refuses_to_load: the serving process cannot load the bundle.
        errors: additional share of calls that fail.
        latency: factor of each call's time.
        tail: factor of the time of the slowest two in a hundred calls.
        leak_mb_per_minute: memory that is never given back.
        wrong_class: answers to inputs of this class are wrong, without an error; None for none.
    """

    targets: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    golden_vectors: bool = False
    refuses_to_load: bool = False
    errors: float = 0.0
    latency: float = 1.0
    tail: float = 1.0
    leak_mb_per_minute: float = 0.0
    wrong_class: int | None = None


_VERSIONS = {"old": "1.0", "new": "2.0"}
"""Of the releases, where a scenario does not say."""


@dataclass(frozen=True, kw_only=True)
class Release:
    """One of the two releases.

    Attributes:
        version: its version.
        size: bytes of each target's file.
        changed: of the new release, the share of its blocks that the old one does not have.
        defects: what is wrong with it.
        backends: backend → factor of each call's time, in the compiler's order: each target has a bundle by each, among
            which devices choose; empty for one bundle.
    """

    version: str
    size: int = 150_000
    changed: float = 1.0
    defects: tuple[Defect, ...] = ()
    backends: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Partition:
    """A part of the fleet that loses its network, and comes back.

    Attributes:
        share: of the devices.
        after: seconds from the rollout's start.
        seconds: how long.
    """

    share: float = 0.5
    after: float = 60.0
    seconds: float = 600.0


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What goes wrong in the fleet, drawn by the seed. Shares are of the devices.

    Attributes:
        loss: share of messages that are lost (QoS 0) or come again seconds later (QoS 1).
        latency: seconds that a message takes; ``jitter`` is added to it, uniformly.
        reboots_per_day: of each device; its disk keeps what it has.
        clock_skew: devices' clocks are wrong by up to so many seconds.
        clock_steps_per_day: how often each clock is set, to another error of that size.
        clock_lost: share whose clock begins in 1970 with each boot.
        disk_full: share without room for another bundle.
        slow: share that takes ``slow_factor`` times as long for everything.
        lying: share that lies.
        lies: how, one of them for each such device.
        silent: share that loses its network for ever when it is told of the new release.
        partition: a part of the fleet that is cut off for a while; None for none.
    """

    loss: float = 0.0
    latency: float = 0.05
    jitter: float = 0.05
    reboots_per_day: float = 0.0
    clock_skew: float = 0.0
    clock_steps_per_day: float = 0.0
    clock_lost: float = 0.0
    disk_full: float = 0.0
    slow: float = 0.0
    slow_factor: float = 10.0
    lying: float = 0.0
    lies: tuple[Lie, ...] = (Lie.IDLE,)
    silent: float = 0.0
    partition: Partition | None = None


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A simulation.

    Attributes:
        seed: of everything that is drawn.
        fleet: the devices.
        old, new: the release that all devices serve, and the one that is rolled out.
        runtime: how the old one behaves.
        faults: what goes wrong in the fleet.
        rollout: the rollout's policy, as ``kedge rollout start --policy`` reads it; None for a plain rollout, to all
            devices at once.
        telemetry: seconds between two messages of a device.
        before: seconds from the fleet's start to the rollout's.
        limit: seconds after which a rollout that has not ended counts as unfinished.
        reports: seconds within which a device's reports become one; 0 sends each, as a real device does.
        tick: in virtual time, seconds between two rounds of the controller without a message to answer.
    """

    seed: int = 1
    fleet: tuple[Group, ...]
    old: Release = Release(version=_VERSIONS["old"])
    new: Release = Release(version=_VERSIONS["new"])
    runtime: Runtime = Runtime()
    faults: Faults = Faults()
    rollout: dict[str, Any] | None = None
    telemetry: float = 300.0
    before: float = 900.0
    limit: float = 86400.0
    reports: float = 1.0
    tick: float = 15.0

    @property
    def total(self) -> int:
        """Number of devices."""
        return sum(group.count for group in self.fleet)

    @property
    def targets(self) -> tuple[str, ...]:
        """The targets, each once."""
        return tuple(dict.fromkeys(group.target for group in self.fleet))

    def check(self) -> Scenario:
        """Return this scenario if it is sound.

        Raises:
            ConfigError: it is not; all that is wrong is named.
        """
        problems = [*self._size_problems(), *_share_problems(self.faults), *self._target_problems()]
        if problems:
            raise ConfigError("the scenario does not fit: " + "; ".join(problems), remedy=_REMEDY)
        if self.rollout is not None:
            policies.parse(self.rollout, where="rollout")
        return self

    def _size_problems(self) -> Iterator[str]:
        if not 1 <= self.total <= MAX_DEVICES or any(group.count < 1 for group in self.fleet):
            yield f"there must be 1 to {MAX_DEVICES} devices, and at least one in each group"
        for name in ("telemetry", "tick", "limit"):
            if not 1 <= getattr(self, name) <= 366 * 86400.0:
                yield f"{name} = {getattr(self, name):g} is out of range"
        if self.old.version == self.new.version:
            yield f"both releases have the version {self.old.version}"
        for release in (self.old, self.new):
            if not 1 <= release.size <= 1 << 30 or not 0 <= release.changed <= 1:
                yield f"size or changed of {release.version} is out of range"
            if any(not factor > 0 for factor in release.backends.values()):
                yield f"a factor of a backend of {release.version} is not above 0"
        if len(self.old.backends) > 1:
            yield "the old release has several backends: what devices have of it would have to be chosen first"

    def _target_problems(self) -> Iterator[str]:
        known = set(self.targets)
        for release in (self.old, self.new):
            for defect in release.defects:
                if unknown := sorted(set(defect.targets) - known):
                    yield f"a defect names {unknown[0]!r}, and no device has this target"
                if unknown := sorted(set(defect.backends) - set(release.backends)):
                    yield f"a defect names {unknown[0]!r}, and the release has no bundle by it"
        for group in self.fleet:
            for key, value in group.labels.items():
                checked_name(key, "label")
                checked_name(value, f"value of the label {key}")

    def defect(self, version: str, target: str, backend: str) -> Defect:
        """Return what is wrong with a bundle of a release, all of it together."""
        release = self.new if version == self.new.version else self.old
        found = [
            one
            for one in release.defects
            if (not one.targets or target in one.targets) and (not one.backends or backend in one.backends)
        ]
        if backend in release.backends:
            found.append(Defect(latency=release.backends[backend]))
        if len(found) < 2:
            return found[0] if found else Defect()
        wrong = next((one.wrong_class for one in found if one.wrong_class is not None), None)
        latency = tail = 1.0
        for one in found:
            latency, tail = latency * one.latency, tail * one.tail
        return Defect(
            golden_vectors=any(one.golden_vectors for one in found),
            refuses_to_load=any(one.refuses_to_load for one in found),
            errors=sum(one.errors for one in found),
            latency=latency,
            tail=tail,
            leak_mb_per_minute=sum(one.leak_mb_per_minute for one in found),
            wrong_class=wrong,
        )


def _share_problems(faults: Faults) -> Iterator[str]:
    for name in ("loss", "disk_full", "slow", "lying", "silent", "clock_lost"):
        if not 0 <= getattr(faults, name) <= (0.9 if name == "loss" else 1):
            yield f"faults.{name} = {getattr(faults, name):g} is no share"
    for name in ("latency", "jitter", "reboots_per_day", "clock_skew", "clock_steps_per_day"):
        if getattr(faults, name) < 0:
            yield f"faults.{name} is negative"
    if not faults.lies:
        yield "faults.lies is empty"
    if faults.partition is not None and not 0 <= faults.partition.share <= 1:
        yield f"faults.partition.share = {faults.partition.share:g} is no share"


def read(path: Path, **changed: Any) -> Scenario:
    """Read a scenario from TOML.

    Args:
        changed: fields that are set over the file's; None leaves a field alone.

    Raises:
        ConfigError: the file cannot be read, or the scenario does not fit.
    """
    document = toml.read(path, ConfigError, remedy=_REMEDY)
    return parse({**document, **{name: one for name, one in changed.items() if one is not None}}, where=str(path))


def parse(document: Mapping[str, Any], *, where: str = "scenario") -> Scenario:
    """Make a scenario of plain data, as TOML holds it.

    Raises:
        ConfigError: it does not fit.
    """
    given = {name: document[name] for name in _VERSIONS if isinstance(document.get(name), Mapping)}
    named = {name: {"version": _VERSIONS[name], **release} for name, release in given.items()}
    return codec.structure({**document, **named}, Scenario, where=where, strict=True).check()
