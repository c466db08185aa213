"""Results of the fleet service."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from kedge.fleet.staged.gates import GateResult
from kedge.fleet.staged.phases import Phase
from kedge.fleet.staged.policy import Policy
from kedge.fleet.staged.waves import Shortfall
from kedge_protocol.messages import Reported, Served, Telemetry


@dataclass(frozen=True, kw_only=True)
class DeviceView:
    """A device.

    Attributes:
        online: as its last status or will said; False while no controller is connected.
        seen_at: when the controller last heard of it (seconds since 1970), 0 for never.
        desired_version, desired: what it shall run: model name → bundle digest.
        reported: what it said last; None before its first word.
        reported_target: the target that it said it is, where that is not the one it was added with; else None.
    """

    name: str
    target: str
    labels: dict[str, str]
    online: bool = False
    seen_at: float = 0.0
    desired_version: int = 0
    desired: dict[str, str] = field(default_factory=dict)
    reported: Reported | None = None
    reported_target: str | None = None


@dataclass(frozen=True, kw_only=True)
class DeviceRow:
    """A device in a list.

    Attributes:
        online, seen_at, reported_target: as of :class:`DeviceView`.
        heard: whether it ever reported.
        serves: model name → version of what it serves; empty text for a version that it does not know.
    """

    name: str
    target: str
    labels: dict[str, str]
    online: bool
    seen_at: float
    heard: bool
    serves: dict[str, str]
    reported_target: str | None = None


@dataclass(frozen=True, kw_only=True)
class DeviceList:
    """The devices with the requested labels.

    Attributes:
        total, online: how many there are in all, and how many of them are there.
        devices: the part that was asked for, by name.
    """

    total: int
    online: int
    devices: tuple[DeviceRow, ...]


@dataclass(frozen=True, kw_only=True)
class CommandQueued:
    """A command queued for a device.

    Attributes:
        sent: whether the controller sent it.
        ok, detail: the device's answer; ``ok`` is None while there is none.
    """

    device: str
    cid: str
    verb: str
    sent: bool
    ok: bool | None = None
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class TransferView:
    """The transfer of one blob to one device.

    Attributes:
        kind: ``blob`` or ``map`` (its block map).
        size: bytes of the blob (not of its map).
        blocks_served: in all.
        blocks_distinct: different ones among them.
        finished_served_again: served although the device had said before that it had them.
        bytes_served: payload.
    """

    digest: str
    kind: str
    size: int
    blocks_served: int
    blocks_distinct: int
    finished_served_again: int
    bytes_served: int


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The latency of one bundle on one device, measured when the device proved the bundle.

    Attributes:
        target: of the device at that time.
        bundle: digest of its manifest.
        files: digest of the file that the runtime opens.
        p50_ms, p95_ms: milliseconds of one call, one after the other.
        calls: how many were timed.
        at: when the controller heard of it (seconds since 1970).
    """

    device: str
    target: str
    bundle: str
    files: str
    p50_ms: float
    p95_ms: float
    calls: int
    at: float


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """The document that ``kedge device latencies -o`` writes and ``kedge compile --latencies`` reads."""

    measurements: tuple[Measurement, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DeviceDetail:
    """A device in full; the newest ``telemetry`` is last."""

    device: DeviceView
    transfers: tuple[TransferView, ...]
    telemetry: tuple[Telemetry, ...]

    @property
    def bytes_served(self) -> int:
        """Payload bytes of all transfers."""
        return sum(transfer.bytes_served for transfer in self.transfers)


@dataclass(frozen=True, kw_only=True)
class BundleView:
    """A bundle of a published release; ``total_bytes`` is of all its blobs."""

    target: str
    digest: str
    backend: str
    precision: str
    total_bytes: int


@dataclass(frozen=True, kw_only=True)
class ReleaseView:
    """A published release."""

    name: str
    version: str
    digest: str
    published_at: float
    bundles: tuple[BundleView, ...]


@dataclass(frozen=True, kw_only=True)
class ReleaseRemoved:
    """A removed release, and the blobs that nothing else needs."""

    release: ReleaseView
    blobs_removed: int
    bytes_removed: int


@dataclass(frozen=True, kw_only=True)
class Published:
    """The outcome of a publication; ``new`` is False if the same release was already published."""

    release: ReleaseView
    new: bool
    blobs_added: int
    bytes_added: int


class Progress(str, enum.Enum):
    """A device's progress in a rollout."""

    PENDING = "pending"
    FETCHING = "fetching"
    PROVING = "proving"
    DONE = "done"
    FAILED = "failed"
    OFFLINE = "offline"
    SUPERSEDED = "superseded"  # a newer rollout wants something else of it
    WAITING = "waiting"  # its wave has not begun
    SILENT = "silent"  # it did not answer in time
    CONFLICT = "conflict"  # two controllers, or two devices of one name: somebody must put it right


@dataclass(frozen=True, kw_only=True)
class DeviceRollout:
    """One device in a rollout.

    Attributes:
        digest: wanted; None where the model is taken away.
        serving: what it said that it serves.
        previous: what it was to have before.
        detail: reason of a failure, or what is waited for.
        served: of a device that is done: the calls or the golden samples that attest it; None where it does not say.
        blocks_done, blocks_total: of the download, as the device said.
        bytes_sent: payload bytes handed to the broker for it, of this bundle's blobs, since the rollout began.
        bytes_received: payload bytes that came, as the device said; 0 where it last spoke of another bundle.
        reported_target: as of :class:`DeviceView`.
        wave: of a staged rollout, from 1 on.
        backend, choice: where the release holds several bundles for its target: whose bundle it was given or kept, and
            why; None before.
    """

    device: str
    target: str
    progress: Progress
    digest: str | None
    serving: str | None = None
    previous: str | None = None
    desired_version: int = 0
    detail: str = ""
    served: Served | None = None
    blocks_done: int = 0
    blocks_total: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    reported_target: str | None = None
    wave: int | None = None
    backend: str | None = None
    choice: str = ""


@dataclass(frozen=True, kw_only=True)
class BackendChoice:
    """One of several bundles for a target.

    Attributes:
        devices: of the rollout that were given it or kept it.
        p50_ms, p95_ms: of a call, the medians over the devices that measured it; None where none has.
        measured: how many devices of the fleet have.
        refused: how many refused it.
        figures_of: the earlier release whose figures these are; empty for its own.
    """

    backend: str
    digest: str
    devices: int
    p50_ms: float | None = None
    p95_ms: float | None = None
    measured: int = 0
    refused: int = 0
    figures_of: str = ""


@dataclass(frozen=True, kw_only=True)
class TargetChoice:
    """What devices of one target have of several bundles, the compiler's choice first.

    Attributes:
        measuring: how many devices of the rollout measure two now.
        waiting: how many wait for their figures.
    """

    target: str
    backends: tuple[BackendChoice, ...]
    measuring: int
    waiting: int


@dataclass(frozen=True, kw_only=True)
class WaveView:
    """One wave: how many devices it has, and how many are at which step (:class:`kedge.fleet.staged.phases.Step`)."""

    number: int
    devices: int
    steps: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class StageView:
    """Where a staged rollout stands.

    Attributes:
        wave: the one that is under way, from 1 on; 0 before the first.
        since: when the phase began (seconds since 1970).
        reason: why it is in this phase, in words; empty where the phase says it.
        reverted_by: the rollout that takes it back.
        steps: how many devices are at which step.
        planned: number of waves in the plan.
        waves: each wave; devices that came later are in one more.
        gates: what the gates said last of this wave.
        policy: as it was started.
    """

    phase: Phase
    paused: bool
    wave: int
    since: float
    reason: str
    reverted_by: int | None
    steps: dict[str, int]
    planned: int
    waves: tuple[WaveView, ...]
    gates: tuple[GateResult, ...]
    policy: Policy


@dataclass(frozen=True, kw_only=True)
class PlannedWave:
    """A wave of a plan.

    Attributes:
        devices: by target, in the order in which they are told.
        bytes: that will move to these devices: the blocks that no bundle has which a device said that it holds.
    """

    number: int
    devices: dict[str, list[str]]
    bytes: int


@dataclass(frozen=True, kw_only=True)
class RolloutPlan:
    """What a rollout would do, and nothing of which was done.

    Attributes:
        devices, bytes: over all waves.
        shortfalls: where a wave does not hold ``min_per_target`` devices of a target.
        powerless: wave → target → the gates on measurements that its devices are too few for by then: there they cannot
            fail.
        skipped: selected devices that it cannot reach (device → reason).
        in_the_way: rollouts of the model that go on and have some of the devices.
    """

    release: str
    devices: int
    bytes: int
    waves: tuple[PlannedWave, ...]
    shortfalls: tuple[Shortfall, ...]
    powerless: dict[int, dict[str, tuple[str, ...]]]
    skipped: dict[str, str]
    in_the_way: tuple[int, ...]
    policy: Policy


@dataclass(frozen=True, kw_only=True)
class RolloutSummary:
    """A rollout in a list.

    Attributes:
        version: of the release; of a revert, the versions that it goes back to.
        kind: ``start`` or ``revert``.
        state: ``active``, or ``superseded`` once newer rollouts of the same model took each of its devices over, or
            ``aborted``.
        done: whether every device that is still its own proved and serves what is wanted; of a staged one, whether all
            of its waves have. Never of a superseded or aborted one.
        counts: how many devices stand where (the values of :class:`Progress`); all of them, whatever a filter shows.
        stage: of a staged rollout: its wave, phase and gates; None of a plain one.
    """

    id: int
    model: str
    version: str
    kind: str
    state: str
    started_at: float
    selected: dict[str, str]
    done: bool
    counts: dict[str, int]
    stage: StageView | None = None


@dataclass(frozen=True, kw_only=True)
class RolloutStatus(RolloutSummary):
    """A rollout with its devices.

    Attributes:
        matching: how many devices the filter lets through.
        devices: those of them that were asked for, by name.
        choices: targets for which the release holds several bundles: who has which, and what is known of each.
    """

    matching: int
    devices: tuple[DeviceRollout, ...]
    choices: tuple[TargetChoice, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RolloutStarted:
    """A started rollout, and the selected devices that it cannot reach (device → reason)."""

    rollout: RolloutStatus
    skipped: dict[str, str]
