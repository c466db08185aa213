"""Messages between devices and the controller, as typed views of JSON (blocks are binary, see
:mod:`kedge_protocol.blocks`).

Times are seconds since 1970 by the sender's clock and are for people only: ordering is by ``version`` (desired) and
by ``boot_id`` with ``seq`` (reported), never by clocks.
"""

from __future__ import annotations

import base64
import enum
from dataclasses import dataclass, field

from kedge_protocol import codec, digest
from kedge_protocol.errors import MessageError

MAX_VERSION_STEP = 10**6
"""Largest step between two desired versions: a wrong number must not lock a device out for good."""


@dataclass(frozen=True, kw_only=True)
class Desired:
    """The desired state of a device. ``version`` grows with each change by the controller; a device ignores older
    versions.

    Attributes:
        models: model name → bundle digest (of the manifest). What is missing here is removed from the device.
        sizes: bundle digest → bytes of its manifest, so that it can be pulled like any blob.
    """

    version: int
    models: dict[str, str]
    sizes: dict[str, int]
    sent_at: float = 0.0

    @property
    def content(self) -> str:
        """Digest of what is wanted, whatever its version: equal models, equal content."""
        return digest.of_bytes(codec.encode(self.models))


class DesiredRefusal(str, enum.Enum):
    """Why a device refuses a desired state."""

    JUMP = "jump"  # its version lies more than MAX_VERSION_STEP above the device's
    CONFLICT = "conflict"  # it has the device's version and other content


@dataclass(frozen=True, kw_only=True)
class RefusedDesired:
    """A desired state that a device refused.

    Attributes:
        version: of what came.
        came: content of what came, see :attr:`Desired.content`.
        held: content that the device holds to; empty where it holds to none.
    """

    version: int
    reason: DesiredRefusal
    came: str
    held: str = ""


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
        digest: of the bundle that failed.
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
        bundle: digest of its manifest.
        files: digest of the file that the runtime opens: two bundles with the same one are as fast.
        p50_ms, p95_ms: milliseconds of one call with one golden sample (as many as the file takes at once).
        calls: how many were timed.
    """

    bundle: str
    files: str
    p50_ms: float
    p95_ms: float
    calls: int


@dataclass(frozen=True, kw_only=True)
class ReportedModel:
    """One model in the reported state.

    Attributes:
        state: where the wanted bundle stands.
        desired: digest that the device works towards.
        digest: what serves now; None where nothing does.
        version: release version of ``digest``.
        previous: the bundle kept for a roll-back.
        proved: whether ``digest`` passed its golden vectors on this device.
        blocks_done, blocks_total: of the download under way.
        bytes_received: payload bytes of blocks received for ``desired`` since it was wanted.
        failure: of the latest wanted bundle, if it failed.
        detail: what is waited for; of a model that serves: what really runs it, where the runtime's name does not say
            it all. In words.
        latency: of ``digest``, measured when it was proved; None from agents before 0.2.
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


@dataclass(frozen=True, kw_only=True)
class Reported:
    """The reported state of a device. ``seq`` grows within one ``boot_id``.

    Attributes:
        refused: the latest desired state, if it was not taken.
        serving_restarts: how often the serving process died, or hung and was killed, since this boot.
        namesake: boot of another device that uses this name; they throw each other off the broker.
        unheard_seconds: of telemetry since this boot that was sent while no controller was there.
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
    at: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Status:
    """Presence of a device or the controller. A will carries the same ``boot_id`` with ``online`` false, so that a late
    will of an earlier boot is recognised. ``session`` grows with each connection of one boot."""

    online: bool
    boot_id: str
    session: int = 0
    at: float = 0.0


class BlobKind(str, enum.Enum):
    """What a request asks for: the bytes of a blob or of its block map, both in blocks of 64 KiB."""

    BLOB = "blob"
    MAP = "map"


@dataclass(frozen=True, kw_only=True)
class BlockRequest:
    """A device's request for blocks of one blob.

    Attributes:
        digest: of the blob (also for its map).
        kind: bytes or map.
        blocks: wanted indices.
        have: finished blocks of this blob on the device's disk, see :func:`encode_bitmap`; the controller's count of
            blocks served twice rests on it.
        boot_id: the agent's.
    """

    digest: str
    kind: BlobKind
    blocks: list[int]
    have: str = ""
    boot_id: str = ""


@dataclass(frozen=True, kw_only=True)
class Command:
    """A one-time command. A ``cid`` that was already done is only acknowledged again, and an offline device never gets
    it.

    Attributes:
        verb: ``report`` (send the reported state again) is known to every agent.
    """

    cid: str
    verb: str


@dataclass(frozen=True, kw_only=True)
class Ack:
    """The outcome of a command."""

    cid: str
    ok: bool
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class ModelTelemetry:
    """Of one model over the last interval; totals since the agent's first start.

    Attributes:
        digest: bundle that served.
        inferences, errors: calls in the interval, over all processes that use the model.
        inferences_total, errors_total: since the model was installed.
        latency_ms: ``p50``, ``p95``, ``p99``, ``mean`` of the interval; empty without calls.
        figures: what the runtime measured of the model on this device, by name with its unit
            (``samples_per_second`` of an accelerator's own throughput test); mostly empty.
    """

    digest: str | None = None
    inferences: int
    errors: int
    inferences_total: int
    errors_total: int
    latency_ms: dict[str, float] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class BoardTelemetry:
    """What boards with sensors of their own tell (Jetson).

    Attributes:
        gpu_percent: load of the GPU, 0..100.
        power_mw: rail → milliwatts.
        temperatures_c: zone → degrees Celsius.
        power_mode: the board's name of it.
    """

    gpu_percent: float | None = None
    power_mw: dict[str, int] = field(default_factory=dict)
    temperatures_c: dict[str, float] = field(default_factory=dict)
    power_mode: str | None = None


@dataclass(frozen=True, kw_only=True)
class Telemetry:
    """Stream ``metrics``, every few seconds.

    Attributes:
        interval: seconds that the interval figures cover.
        cpu_percent: of the whole device, 0..100.
        memory_total_bytes, memory_available_bytes: of the device.
        agent_bytes: resident memory of the agent's processes.
        temperature_c: hottest thermal zone in degrees Celsius; None where there is none.
        board: of boards that have more to tell.
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


def encode_bitmap(finished: bytes | bytearray) -> str:
    """Base64 of a bitmap, least significant bit first within each byte; bit i says that block i is finished."""
    return base64.b64encode(bytes(finished).rstrip(b"\0")).decode("ascii")


def decode_bitmap(text: str, *, where: str) -> bytes:
    """The bitmap's bytes; what is beyond its end is unset.

    Raises:
        MessageError: not base64.
    """
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise MessageError(f"the bitmap is not base64: {error}", where=where) from error


def bit_is_set(bitmap: bytes | bytearray, index: int) -> bool:
    """Whether block ``index`` is finished."""
    byte = index >> 3
    return byte < len(bitmap) and bool(bitmap[byte] >> (index & 7) & 1)
