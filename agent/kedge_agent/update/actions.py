"""Actions of the update machine, performed in order. An action with an outcome names its event."""

from __future__ import annotations

from dataclasses import dataclass, field

from kedge_protocol.bundle.layout import Bundle
from kedge_protocol.messages import BlockRequest, Failure, Latency, ReportedCandidate
from kedge_protocol.trust import Trust


@dataclass(frozen=True)
class RequestBlocks:
    """Publish a request for blocks, once; the machine itself asks again."""

    rid: str
    request: BlockRequest


@dataclass(frozen=True, kw_only=True)
class OpenBlob:
    """Find out what the store has of a blob → ``BlobOpened``.

    Attributes:
        map_digest: digest of the block map; None for a blob that is pulled into memory.
        block_map: the pulled and checked map, to be stored first.
        read: whether to return the bytes of a complete blob.

    If the map is stored or given, the partial file is opened, its finished blocks are found by their hashes, and blocks
    that another stored blob holds are copied.
    """

    digest: str
    size: int
    map_digest: str | None = None
    block_map: bytes | None = None
    read: bool = False


@dataclass(frozen=True)
class WriteBlock:
    """Write a checked block into the open partial file. Only a failure has an outcome → ``WriteFailed``."""

    digest: str
    index: int
    payload: bytes | memoryview


@dataclass(frozen=True)
class FinishBlob:
    """Check the digest of a blob with all its blocks and move it into place → ``BlobStored``."""

    digest: str


@dataclass(frozen=True)
class StoreBlob:
    """Store a blob whose digest was checked in memory → ``BlobStored``."""

    digest: str
    data: bytes


@dataclass(frozen=True)
class CloseBlob:
    """Close a blob that is no longer wanted. Its partial file stays for later."""

    digest: str


@dataclass(frozen=True)
class Measure:
    """Find out whether there is room and a runtime for a bundle → ``Measured``."""

    model: str
    bundle: Bundle


@dataclass(frozen=True)
class Assemble:
    """Create the bundle's slot from checked blobs → ``Assembled``."""

    model: str
    bundle: Bundle


@dataclass(frozen=True)
class Prove:
    """Run the golden vectors in the worker → ``Proved``.

    Attributes:
        beside: whether the version that serves stays in memory whatever is needed: the bundle is to run beside it.
    """

    model: str
    bundle: Bundle
    beside: bool = False


@dataclass(frozen=True)
class Switch:
    """Make the slot current and keep the previous one → ``Switched``."""

    model: str
    bundle: Bundle


@dataclass(frozen=True)
class AskEndpoint:
    """Send golden samples of the current bundle through the served endpoint and compare → ``EndpointAnswered``.

    Attributes:
        attempt: number of the attempt, which its outcome repeats.
    """

    model: str
    digest: str
    attempt: int


@dataclass(frozen=True, kw_only=True)
class StartShadow:
    """Run an assembled and proved bundle beside the one that serves → ``ShadowEnded`` if it ends by itself.

    Attributes:
        beside: digest of the bundle whose answers it is compared with.
        share, memory_bytes: see :class:`kedge_protocol.messages.Shadow`.
    """

    model: str
    digest: str
    beside: str
    share: float
    memory_bytes: int


@dataclass(frozen=True)
class StopShadow:
    """End a model's shadow, if it runs."""

    model: str


@dataclass(frozen=True)
class RollBack:
    """Make the previous slot current again → ``Switched``."""

    model: str


@dataclass(frozen=True)
class Remove:
    """Remove the model from the device → ``Switched``."""

    model: str


@dataclass(frozen=True)
class CollectGarbage:
    """Remove blobs, partial files, maps and slots that no current or previous slot needs.

    Attributes:
        keep: digests in use: blobs, and bundles whose slot stays.
    """

    keep: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A bundle that failed. It is not tried again until it is asked for with another version; see
    :attr:`kedge_protocol.messages.Desired.orders`."""

    version: int
    failure: Failure


@dataclass(frozen=True, kw_only=True)
class Attested:
    """What attests that a bundle serves, since the switch to it.

    Attributes:
        base: calls that had been counted of this bundle before the switch; None if unknown.
        calls, golden: see :class:`kedge_protocol.messages.Served`.
    """

    digest: str
    base: int | None = None
    calls: int = 0
    golden: int = 0


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The outcome of two candidates: ``bundles`` in the desired state's order. None is kept if both failed."""

    bundles: tuple[str, str]
    candidates: tuple[ReportedCandidate, ...]

    @property
    def kept(self) -> str | None:
        """Return the digest of the candidate that was kept."""
        return next((one.digest for one in self.candidates if one.kept), None)


@dataclass(frozen=True, kw_only=True)
class PersistentState:
    """The machine's state that survives a restart.

    Attributes:
        desired: the accepted desired state, as received (JSON); empty before the first.
        refused: refused bundles by model name.
        served: model name → digest that has been seen serving on this device since the switch to it.
        latencies: model name → latency of its served bundle, measured when it was proved.
        probation: model name → digest that was switched to recently and has not served for long yet.
        received: bundle's digest → payload bytes received for it.
        attested: model name → what attests that its bundle serves.
        choices: model name → what was chosen of two candidates.
        pinned, trusted: the keys that the kit gave, and those after all rotations; None without.
    """

    desired: str = ""
    refused: dict[str, Refusal] = field(default_factory=dict)
    served: dict[str, str] = field(default_factory=dict)
    latencies: dict[str, Latency] = field(default_factory=dict)
    probation: dict[str, str] = field(default_factory=dict)
    received: dict[str, int] = field(default_factory=dict)
    attested: dict[str, Attested] = field(default_factory=dict)
    choices: dict[str, Choice] = field(default_factory=dict)
    pinned: Trust | None = None
    trusted: Trust | None = None

    def trust(self, pinned: Trust | None) -> Trust | None:
        """Return the keys to trust: the remembered ones, unless the kit has given others since."""
        return self.trusted if self.pinned == pinned else pinned


@dataclass(frozen=True)
class Remember:
    """Write the persistent state to disk."""

    memory: PersistentState


@dataclass(frozen=True)
class Report:
    """Publish the changed reported state."""


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
    | AskEndpoint
    | StartShadow
    | StopShadow
    | RollBack
    | Remove
    | CollectGarbage
    | Remember
    | Report
)
