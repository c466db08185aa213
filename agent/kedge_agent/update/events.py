"""Events of the update machine. Each may arrive late, twice, or for something that is no longer wanted."""

from __future__ import annotations

from dataclasses import dataclass, field

from kedge_protocol.blocks import BlockAnswer
from kedge_protocol.messages import Latency, Status


@dataclass(frozen=True)
class Connected:
    """The broker accepted a new connection."""


@dataclass(frozen=True)
class Disconnected:
    """The connection is lost, and pending requests with it."""


@dataclass(frozen=True)
class ControllerSeen:
    """The controller's retained status arrived."""

    status: Status


@dataclass(frozen=True)
class DesiredArrived:
    """A desired state arrived, as the raw bytes of the message."""

    raw: bytes


@dataclass(frozen=True)
class BlockArrived:
    """One answer to request ``rid``."""

    rid: str
    answer: BlockAnswer


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True, kw_only=True)
class BlobOpened:
    """Outcome of :class:`~kedge_agent.update.actions.OpenBlob`.

    Attributes:
        complete: the store has the blob, checked.
        data: its bytes, where they were asked for and it is complete.
        block_map: its block map, checked; None where the store has none and none was given.
        have: bitmap of the finished blocks on disk, copied ones among them.
        error: why the store cannot hold it.
    """

    digest: str
    complete: bool = False
    data: bytes | None = None
    block_map: bytes | None = None
    have: bytes = b""
    error: str | None = None


@dataclass(frozen=True)
class BlobStored:
    """Outcome of ``StoreBlob`` and ``FinishBlob``: the blob is stored under its digest, or the error."""

    digest: str
    error: str | None = None


@dataclass(frozen=True)
class WriteFailed:
    """A block could not be written (disk full)."""

    digest: str
    error: str


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Outcome of ``Measure``: the resources of this device.

    Attributes:
        missing_bytes: of the bundle's files that still have to be written.
        free_bytes: of the disk that the state lies on.
        memory_bytes: of the whole device.
        runtimes: installed distribution → version, of those that were asked about.
        error: why it could not be found out.
    """

    model: str
    digest: str
    missing_bytes: int = 0
    free_bytes: int = 0
    memory_bytes: int = 0
    runtimes: dict[str, str] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class Assembled:
    """Outcome of ``Assemble``."""

    model: str
    digest: str
    error: str | None = None


@dataclass(frozen=True)
class Proving:
    """``Prove`` started (``detail`` None) or made progress: a backend may build for minutes."""

    model: str
    digest: str
    detail: str | None = None


@dataclass(frozen=True)
class Proved:
    """Outcome of ``Prove``: the golden vectors match, or the error.

    Attributes:
        detail: what really ran them, in words, where the runtime's name does not say it all.
        latency: of a call on this device.
    """

    model: str
    digest: str
    error: str | None = None
    detail: str | None = None
    latency: Latency | None = None


@dataclass(frozen=True)
class Installed:
    """The installed bundles of one model."""

    current: str | None = None
    version: str | None = None
    previous: str | None = None


@dataclass(frozen=True)
class Switched:
    """Outcome of ``Switch``, ``RollBack`` and ``Remove``: the installed bundles; None if unknown."""

    model: str
    installed: Installed | None
    error: str | None = None


@dataclass(frozen=True)
class Served:
    """The serving child loaded a bundle, or failed to.

    Attributes:
        detail: what really runs it, in words, where the runtime's name does not say it all.
    """

    model: str
    digest: str
    error: str | None = None
    detail: str | None = None


@dataclass(frozen=True)
class ServingDied:
    """The serving child died, or hung and was killed.

    Attributes:
        reason: its last words.
        came_up: whether it had begun to serve at all; else no bundle is to blame.
    """

    reason: str
    came_up: bool = True


Event = (
    Connected
    | Disconnected
    | ControllerSeen
    | DesiredArrived
    | BlockArrived
    | Tick
    | BlobOpened
    | BlobStored
    | WriteFailed
    | Measured
    | Assembled
    | Proving
    | Proved
    | Switched
    | Served
    | ServingDied
)
