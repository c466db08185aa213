"""What the update machine wants done, in this order. Those with an outcome name the event that brings it."""

from __future__ import annotations

from dataclasses import dataclass, field

from kedge_protocol.bundle.layout import Bundle
from kedge_protocol.messages import BlockRequest, Failure, Latency


@dataclass(frozen=True)
class RequestBlocks:
    """Publish a request for blocks (at most once: the machine itself asks again)."""

    rid: str
    request: BlockRequest


@dataclass(frozen=True, kw_only=True)
class OpenBlob:
    """See what the store has of a blob → ``BlobOpened``.

    Attributes:
        map_digest: of its block map; None for a blob that is pulled into memory.
        block_map: the map, pulled and checked; it is stored first.
        read: bring the bytes of a complete blob.

    With a map in the store or given, the partial file is opened, its finished blocks are found by their hashes, and
    blocks that another blob of the store holds are copied.
    """

    digest: str
    size: int
    map_digest: str | None = None
    block_map: bytes | None = None
    read: bool = False


@dataclass(frozen=True)
class WriteBlock:
    """Write a checked block into the open partial file; only a failure is answered → ``WriteFailed``."""

    digest: str
    index: int
    payload: bytes | memoryview


@dataclass(frozen=True)
class FinishBlob:
    """All blocks are there: check the whole blob's digest and put it in its place → ``BlobStored``."""

    digest: str


@dataclass(frozen=True)
class StoreBlob:
    """Store a blob whose digest was checked in memory → ``BlobStored``."""

    digest: str
    data: bytes


@dataclass(frozen=True)
class CloseBlob:
    """The blob is not wanted any more. Its partial file stays for later."""

    digest: str


@dataclass(frozen=True)
class Measure:
    """Find out whether there is room and a runtime for a bundle → ``Measured``."""

    model: str
    bundle: Bundle


@dataclass(frozen=True)
class Assemble:
    """Make the bundle's slot of checked blobs → ``Assembled``."""

    model: str
    bundle: Bundle


@dataclass(frozen=True)
class Prove:
    """Run the golden vectors in the worker → ``Proved``."""

    model: str
    bundle: Bundle


@dataclass(frozen=True)
class Switch:
    """Make the slot current, keep the one before → ``Switched``."""

    model: str
    bundle: Bundle


@dataclass(frozen=True)
class RollBack:
    """Make the previous slot current again → ``Switched``."""

    model: str


@dataclass(frozen=True)
class Remove:
    """Take the model off the device → ``Switched``."""

    model: str


@dataclass(frozen=True)
class CollectGarbage:
    """Remove blobs, partial files, maps and slots that no current or previous slot needs.

    Attributes:
        keep: digests in work: blobs, and bundles whose slot stays.
    """

    keep: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A wanted bundle that failed under one desired version; it is not tried again under that version."""

    version: int
    failure: Failure


@dataclass(frozen=True, kw_only=True)
class PersistentState:
    """What the machine must not forget over a restart.

    Attributes:
        desired: the accepted desired state, as it came (JSON); empty before the first.
        refused: by model name.
        served: model name → digest that was seen serving on this device since it was switched to.
        latencies: model name → what its served bundle took when it was proved.
        probation: model name → digest that was switched to and has not served for long yet.
        received: bundle's digest → payload bytes that came for it.
    """

    desired: str = ""
    refused: dict[str, Refusal] = field(default_factory=dict)
    served: dict[str, str] = field(default_factory=dict)
    latencies: dict[str, Latency] = field(default_factory=dict)
    probation: dict[str, str] = field(default_factory=dict)
    received: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Remember:
    """Write the memory to disk."""

    memory: PersistentState


@dataclass(frozen=True)
class Report:
    """The reported state changed; publish it."""


Action = (
    RequestBlocks
    | OpenBlob
    | WriteBlock
    | FinishBlob
    | StoreBlob
    | CloseBlob
    | Measure
    | Assemble
    | Prove
    | Switch
    | RollBack
    | Remove
    | CollectGarbage
    | Remember
    | Report
)
