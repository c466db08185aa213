"""Messages between devices and the controller, as typed views of JSON (blocks are binary, see
:mod:`kedge_protocol.blocks`).

Times are seconds since 1970 by the sender's clock and are informational only: ordering is by ``version`` (desired) and
by ``boot_id`` with ``seq`` (reported), never by clocks.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from kedge_protocol import codec, digest, signatures
from kedge_protocol.samples import ReportedSamples, SampleRequest
from kedge_protocol.signatures import Envelope
from kedge_protocol.telemetry import BoardTelemetry, GenerationTelemetry

MAX_VERSION_STEP = 10**6
"""The largest step between two desired versions, so that a wrong number does not lock a device out for good."""
MAX_SOAK = 7 * 86400.0
"""The longest soak of a desired state, in seconds."""


@dataclass(frozen=True, kw_only=True)
class Shadow:
    """A bundle that runs beside a model's own on a sample of its live inputs. It answers nobody.

    Attributes:
        digest, size: of the bundle's manifest.
        share: the share of one processor core that it may use.
        memory_bytes: the resident memory beyond which it is ended.
    """

    digest: str
    size: int
    share: float = 0.1
    memory_bytes: int = 512 << 20


@dataclass(frozen=True, kw_only=True)
class Desired:
    """The desired state of a device. ``version`` grows with each change by the controller; devices ignore older ones.

    Attributes:
        models: model name → bundle digest (of the manifest). A model missing here is removed from the device.
        sizes: bundle digest → size of its manifest in bytes, so that it can be pulled like any blob.
        soaks: model name → seconds after the switch for which calls of users are waited for before golden samples are
            sent through the served endpoint (:class:`Served`); 0 where it is missing.
        rivals: model name → another bundle, to be measured too; the better is kept (:mod:`kedge_protocol.candidates`).
        shadows: model name → the bundle that runs beside its own.
        samples: model name → the samples that the device shall send home.
        orders: model name → the version with which its bundle was asked for last. A bundle that failed is tried again
            only when it is asked for again, not whenever something else of the state changes; a model missing here is
            asked for with each version.
        device: the device that it is for; another one refuses it.
        releases: the signed statements of the releases that the bundles are of.
        rotations: all signed rotations of keys so far, in their order.
    """

    version: int
    models: dict[str, str]
    sizes: dict[str, int]
    soaks: dict[str, float] = field(default_factory=dict)
    rivals: dict[str, str] = field(default_factory=dict)
    shadows: dict[str, Shadow] = field(default_factory=dict)
    samples: dict[str, SampleRequest] = field(default_factory=dict)
    orders: dict[str, int] = field(default_factory=dict)
    sent_at: float = 0.0
    device: str = ""
    releases: tuple[Envelope, ...] = ()
    rotations: tuple[Envelope, ...] = ()

    @property
    def content(self) -> str:
        """The digest of what is desired, without the version: equal states have equal content."""
        shadows = {name: shadow.digest for name, shadow in self.shadows.items()}
        samples = {name: request.rid for name, request in self.samples.items()}
        parts = [self.models, shadows, samples, self.rivals]
        while len(parts) > 1 and not parts[-1]:
            parts.pop()
        return digest.of_bytes(codec.encode(parts if len(parts) > 1 else self.models))

    def order(self, model: str) -> int:
        """Return the version with which a model's bundle was asked for last."""
        return self.orders.get(model, self.version)

    def pair(self, model: str) -> tuple[str, str] | None:
        """Return the two bundles among which the device chooses; None where one is given."""
        both = (self.models.get(model, ""), self.rivals.get(model, ""))
        return both if all(both) else None


def open_desired(raw: bytes, *, where: str) -> tuple[Envelope | None, Desired]:
    """Parse a desired state: its envelope, or None for a bare one, and its content. No signature is checked; see
    :class:`kedge_agent.update.desired_states.DesiredStates`.

    Raises:
        MessageError: it is none.
    """
    envelope = signatures.find_envelope(raw, where=where)
    content = raw if envelope is None else envelope.content(where=where)
    return envelope, codec.decode(content, Desired, where=where)


def decode_desired(raw: bytes, *, where: str) -> Desired:
    """Return the content of a desired state; see :func:`open_desired`."""
    return open_desired(raw, where=where)[1]


class DesiredRefusal(str, enum.Enum):
    """Why a device refuses a desired state."""

    JUMP = "jump"  # its version lies more than MAX_VERSION_STEP above the device's
    CONFLICT = "conflict"  # it has the device's version and other content
    OLDER = "older"  # its version lies below the device's
    UNSIGNED = "unsigned"  # it is not signed
    SIGNATURE = "signature"  # no trusted controller key signed it, or a rotation of keys is not to be followed
    DEVICE = "device"  # it is for another device
    RELEASE = "release"  # a bundle is not of a signed release, or is for another target or model


@dataclass(frozen=True, kw_only=True)
class RefusedDesired:
    """A desired state that a device refused.

    Attributes:
        version: the version of the refused state.
        came: the content of the refused state; see :attr:`Desired.content`.
        held: the content of the state that the device keeps; empty if there is none.
        detail: the reason in words.
    """

    version: int
    reason: DesiredRefusal
    came: str
    held: str = ""
    detail: str = ""


class ModelState(str, enum.Enum):
    """The state of one model on a device."""

    WAITING = "waiting"  # wanted, but the controller is away or the download is backing off
    FETCHING = "fetching"
    PROVING = "proving"
    SWITCHING = "switching"
    SERVING = "serving"
    FAILED = "failed"  # the wanted bundle was refused; ``digest`` (if any) goes on serving


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a desired bundle does not serve.

    Attributes:
        digest: the digest of the bundle that failed.
        stage: ``fetch``, ``check``, ``prove``, ``switch`` or ``serve``.
        reason: the error in words.
    """

    digest: str
    stage: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Latency:
    """The latency of sequential calls of one bundle on the device that proved it.

    Attributes:
        bundle: the digest of the bundle's manifest.
        files: the digest of the file that the runtime opens: two bundles with the same one are equally fast.
        p50_ms, p95_ms: milliseconds of one call with one golden sample (or with the file's fixed batch of them).
        calls: the number of calls timed.
    """

    bundle: str
    files: str
    p50_ms: float
    p95_ms: float
    calls: int


@dataclass(frozen=True, kw_only=True)
class Served:
    """What a bundle answered on a device since the switch to it: the attestation that it serves.

    Attributes:
        calls: the calls of users that it answered, over all processes that use the model. The number is as of the
            report, which is sent with the first call and not with each; telemetry has the present one.
        golden: the golden samples that were sent through the served endpoint and held, where no call came within the
            soak; 0 before.
        problem: why golden samples could not be sent through the endpoint yet, or did not hold.
    """

    calls: int = 0
    golden: int = 0
    problem: str | None = None

    @property
    def by(self) -> str | None:
        """What attests it: ``calls`` of users, ``golden`` samples, or None while nothing does."""
        return "calls" if self.calls > 0 else "golden" if self.golden > 0 else None


@dataclass(frozen=True, kw_only=True)
class ReportedCandidate:
    """What became of one of two candidates: its latency, or why it does not serve; and which one was ``kept``."""

    digest: str
    latency: Latency | None = None
    failure: Failure | None = None
    kept: bool = False


@dataclass(frozen=True, kw_only=True)
class ReportedShadow:
    """A model's shadow: ``serving`` where it runs on live inputs, ``failed`` where it does not; ``detail`` says why."""

    digest: str
    state: ModelState
    detail: str | None = None


@dataclass(frozen=True, kw_only=True)
class ReportedModel:
    """One model in the reported state.

    Attributes:
        state: the state of the desired bundle.
        desired: the digest of the desired bundle.
        digest: the digest of the bundle that serves now; None if none does.
        version: the release version of ``digest``.
        previous: the bundle kept for a rollback.
        proved: whether ``digest`` passed its golden vectors on this device.
        blocks_done, blocks_total: the progress of the current download.
        bytes_received: the payload bytes of blocks received for ``desired`` since it became desired.
        failure: the failure of the latest desired bundle, if it failed.
        detail: in words, what the device is waiting for; for a serving model, what really runs it, if the runtime's
            name does not say it all.
        latency: the latency of ``digest``, measured when it was proved; None from agents before 0.2.
        served: what ``digest`` answered since the switch to it, while it is the desired bundle and serves; None from
            older agents.
        shadow: the bundle that runs beside it, if one is desired.
        candidates: of two desired bundles those that were tried; both once one was kept, or both failed.
    """

    state: ModelState
    desired: str | None = None
    digest: str | None = None
    version: str | None = None
    previous: str | None = None
    proved: bool = False
    blocks_done: int = 0
    blocks_total: int = 0
    bytes_received: int = 0
    failure: Failure | None = None
    detail: str | None = None
    latency: Latency | None = None
    served: Served | None = None
    shadow: ReportedShadow | None = None
    candidates: tuple[ReportedCandidate, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Reported:
    """The reported state of a device. ``seq`` grows within one ``boot_id``.

    Attributes:
        refused: the latest desired state, if the device refused it.
        serving_restarts: how often the serving process died, or hung and was killed, since this boot.
        namesake: the boot of another device with the same name; the two disconnect each other from the broker.
        unheard_seconds: the seconds of telemetry since this boot that were sent while there was no controller.
        trusted_keys: the ids of the keys that the device trusts; empty for a device that takes unsigned states.
        samples: model name → where it stands with the samples that it is asked for.
    """

    boot_id: str
    seq: int
    target: str
    agent_version: str
    architecture: str
    python: str
    runtimes: dict[str, str]
    free_bytes: int
    desired_version: int
    models: dict[str, ReportedModel] = field(default_factory=dict)
    endpoint: str | None = None
    refused: RefusedDesired | None = None
    serving_restarts: int = 0
    namesake: str | None = None
    unheard_seconds: float = 0.0
    trusted_keys: tuple[str, ...] = ()
    samples: dict[str, ReportedSamples] = field(default_factory=dict)
    at: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Status:
    """The presence of a device or the controller. A will carries the same ``boot_id`` with ``online`` false, so that a
    late will of an earlier boot is recognized. ``session`` grows with each connection of one boot."""

    online: bool
    boot_id: str
    session: int = 0
    at: float = 0.0


class BlobKind(str, enum.Enum):
    """The kind of data requested: the bytes of a blob or of its block map, both in blocks of 64 KiB."""

    BLOB = "blob"
    MAP = "map"


@dataclass(frozen=True, kw_only=True)
class BlockRequest:
    """A device's request for blocks of one blob.

    Attributes:
        digest: the digest of the blob (also for its map).
        kind: bytes or map.
        blocks: the requested indices.
        have: the finished blocks on the device's disk (:mod:`kedge_protocol.bitmaps`), to count blocks served twice.
        boot_id: the agent's boot id.
    """

    digest: str
    kind: BlobKind
    blocks: list[int]
    have: str = ""
    boot_id: str = ""


@dataclass(frozen=True, kw_only=True)
class Command:
    """A one-time command. A ``cid`` that was already done is only acknowledged again; an offline device never gets the
    command.

    Attributes:
        verb: the action; every agent knows ``report`` (send the reported state again). ``samples`` is no command but
            the answer to a chunk of samples of request ``cid``, and is not acknowledged.
        received: for ``samples``: how many bytes of the file the controller has; all of them once it is checked.
    """

    cid: str
    verb: str
    received: int = 0


@dataclass(frozen=True, kw_only=True)
class Ack:
    """The outcome of a command."""

    cid: str
    ok: bool
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class ShadowTelemetry:
    """What a shadow answered in one interval, beside the bundle that serves.

    Attributes:
        digest: of the shadow.
        compared, agreed: samples that both answered, and those that they answered alike: the same class, integers or
            texts, else numbers within a tenth of the old answer's root mean square, one between 0 and 1 within 0.1.
        classes: class of the old answer → (compared, agreed); at most 64 classes, the others under ``other``.
        confidence_shift: sum over the compared samples of the new confidence less the old one.
        old_buckets, new_buckets: latencies of these calls, see :mod:`kedge_protocol.latency_buckets`.
        errors: calls on which the shadow failed.
    """

    digest: str
    compared: int = 0
    agreed: int = 0
    classes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    confidence_shift: float = 0.0
    old_buckets: dict[str, int] = field(default_factory=dict)
    new_buckets: dict[str, int] = field(default_factory=dict)
    errors: int = 0


@dataclass(frozen=True, kw_only=True)
class ModelTelemetry:
    """Telemetry of one model over the last interval; totals are since the agent's first start.

    Attributes:
        digest: the bundle that served.
        inferences, errors: the calls of the interval that were answered, and those that failed, of all processes.
        inferences_total, errors_total: the same since the model was installed.
        latency_ms: ``p50``, ``p95``, ``p99``, ``mean`` of the interval; empty without calls.
        latency_buckets: the interval's histogram, which adds up over intervals and devices, see
            :mod:`kedge_protocol.latency_buckets`.
        mixed: whether calls of another bundle are among those of the interval, as after a switch.
        memory_bytes: the resident memory of the serving process, which also holds the device's other models; None where
            there is none, since applications load the model themselves.
        drift: the samples of ``digest`` that were looked at in the interval: stream's name → counts of its bins, see
            :mod:`kedge_protocol.drift`; empty without a baseline.
        shadow: what the bundle beside it answered in the interval; None without one.
        generation: how fast a language model answered in the interval; None for other models, and without answers.
        figures: the runtime's own measurements of the model on this device, by a name that includes the unit
            (``samples_per_second`` of an accelerator's own throughput test); usually empty.
    """

    digest: str | None = None
    inferences: int
    errors: int
    inferences_total: int
    errors_total: int
    latency_ms: dict[str, float] = field(default_factory=dict)
    latency_buckets: dict[str, int] = field(default_factory=dict)
    mixed: bool = False
    memory_bytes: int | None = None
    drift: dict[str, tuple[int, ...]] = field(default_factory=dict)
    shadow: ShadowTelemetry | None = None
    generation: GenerationTelemetry | None = None
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def calls(self) -> int:
        """All calls of the interval."""
        return self.inferences + self.errors


@dataclass(frozen=True, kw_only=True)
class Telemetry:
    """The telemetry stream ``metrics``, sent every few seconds.

    Attributes:
        interval: the seconds that the interval figures cover.
        cpu_percent: the CPU load of the whole device, 0..100.
        memory_total_bytes, memory_available_bytes: the memory of the device.
        agent_bytes: the resident memory of the agent's processes.
        temperature_c: the hottest thermal zone in degrees Celsius; None if there is none.
        board: telemetry of boards that report more.
    """

    boot_id: str
    seq: int
    interval: float
    models: dict[str, ModelTelemetry]
    cpu_percent: float
    memory_total_bytes: int
    memory_available_bytes: int
    agent_bytes: int
    free_bytes: int
    temperature_c: float | None = None
    board: BoardTelemetry | None = None
    at: float = 0.0
