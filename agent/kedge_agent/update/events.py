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
        complete: whether the store has the blob, checked.
        data: the blob's bytes if they were requested and the blob is complete.
        block_map: the checked block map; None if the store has none and none was given.
        have: bitmap of the finished blocks on disk, including copied ones.
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
        missing_bytes: bytes of the bundle's files still to be written.
        free_bytes: free space of the disk with the state folder.
        memory_bytes: memory of the device.
        runtimes: installed distribution → version, for the requested ones.
        error: why the resources are unknown.
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
        detail: description of what ran the vectors; None if the runtime's name says it all.
        latency: latency of a call on this device.
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
    """Outcome of ``Switch``, ``RollBack`` and ``Remove``: the installed bundles; None if unknown.

    Attributes:
        calls: of ``Switch``: calls that had been counted of the bundle before it became current.
    """

    model: str
    installed: Installed | None
    error: str | None = None
    calls: int | None = None


@dataclass(frozen=True)
class Counted:
    """The calls of users that a bundle has answered so far, over all processes."""

    model: str
    digest: str
    calls: int


@dataclass(frozen=True, kw_only=True)
class EndpointAnswered:
    """Outcome of ``AskEndpoint``.

    Attributes:
        samples: number of golden samples that were answered and held.
        error: why not all did; None if they did.
        wrong: whether an answer lies outside the tolerance, which no further attempt mends.
    """

    model: str
    digest: str
    attempt: int
    samples: int = 0
    error: str | None = None
    wrong: bool = False


@dataclass(frozen=True)
class Served:
    """The serving process loaded a bundle, or failed to.

    Attributes:
        detail: description of what runs the bundle; None if the runtime's name says it all.
    """

    model: str
    digest: str
    error: str | None = None
    detail: str | None = None


@dataclass(frozen=True)
class ShadowEnded:
    """A shadow ended by itself, or was ended for what it took."""

    model: str
    digest: str
    reason: str


@dataclass(frozen=True)
class ServingDied:
    """The serving process died, or hung and was killed.

    Attributes:
        reason: how the process ended.
        came_up: whether it had begun to serve; otherwise no bundle is to blame.
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
    | Counted
    | EndpointAnswered
    | Served
    | ShadowEnded
    | ServingDied
)
