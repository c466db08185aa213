"""Fetches blobs: looks in the store, pulls the block map, copies known blocks, pulls the rest, and checks the result.

A blob of one block, a manifest or a configuration has no map and is pulled into memory, checked, and stored as a whole.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field

from kedge_agent.update import actions, events
from kedge_agent.update.block_requests import BlockRequests
from kedge_agent.update.transfer import Transfer, Verdict
from kedge_protocol.blocks import HASH_SIZE, BlockAnswer, BlockStatus, block_count
from kedge_protocol.messages import BlobKind

MAX_IN_MEMORY = 4 << 20
"""Largest size, in bytes, of a document or block map (a map of 4 MiB belongs to a blob of 8 GiB)."""


class Stage(enum.Enum):
    """The stage of a fetch."""

    LOOK = "looking for what is there"
    MAP = "block map"
    BLOCKS = "blocks"
    CHECK = "checking"


@dataclass
class Fetch:
    """One blob for which one or more models wait.

    Attributes:
        size: size in bytes.
        map_digest: None for a blob that is pulled into memory.
        read: whether its bytes are needed, not only its presence.
        models: the models that wait for it.
    """

    digest: str
    size: int
    map_digest: str | None
    read: bool
    models: set[str] = field(default_factory=set)
    stage: Stage = Stage.LOOK
    transfer: Transfer | None = None
    data: bytes | None = None

    @property
    def on_disk(self) -> bool:
        """Return whether it waits for the disk rather than the controller."""
        return self.stage in (Stage.LOOK, Stage.CHECK)

    @property
    def blocks_done(self) -> int:
        """Return the number of finished blocks of the blob (not of its map)."""
        if self.stage is Stage.CHECK:
            return block_count(self.size)
        return self.transfer.done if self.stage is Stage.BLOCKS and self.transfer is not None else 0


@dataclass(frozen=True)
class Outcome:
    """The end of a fetch: the blob is in the store (with ``data`` if requested), or ``error`` says why not."""

    digest: str
    models: frozenset[str]
    data: bytes | None = None
    error: str | None = None


class Fetches:
    """All blobs that are being fetched.

    Args:
        traffic: requests their blocks.
        emit: called with each action.
    """

    def __init__(self, traffic: BlockRequests, emit: Callable[[actions.Action], None]) -> None:
        self.traffic = traffic
        self.outcomes: list[Outcome] = []
        self._emit = emit
        self._fetches: dict[str, Fetch] = {}

    def want(self, model: str, digest: str, size: int, *, map_digest: str | None = None, read: bool = False) -> None:
        """Fetch a blob for a model; the result appears in :attr:`outcomes`."""
        fetch = self._fetches.get(digest)
        if fetch is not None and (fetch.read or not read):
            fetch.models.add(model)
            return
        needed = block_count(size) * HASH_SIZE if map_digest else size
        if needed > MAX_IN_MEMORY:
            what = "its block map" if map_digest else "a blob without a block map"
            error = f"{digest} cannot be pulled: {what} has {needed} bytes, {MAX_IN_MEMORY} are allowed"
            self.outcomes.append(Outcome(digest, frozenset({model}), error=error))
            return
        models = fetch.models | {model} if fetch is not None else {model}
        if fetch is not None:
            self._stop(fetch)
        self._fetches[digest] = Fetch(digest, size, map_digest, read, models)
        self._emit(actions.OpenBlob(digest=digest, size=size, map_digest=map_digest, read=read))

    def unwant(self, model: str) -> None:
        """Drop a model's interest in all blobs. A blob without interest stops; its partial file stays."""
        for fetch in list(self._fetches.values()):
            fetch.models.discard(model)
            if not fetch.models:
                self._stop(fetch)
                self._emit(actions.CloseBlob(fetch.digest))

    def of(self, model: str) -> list[Fetch]:
        """Return the fetches for which a model waits."""
        return [fetch for fetch in self._fetches.values() if model in fetch.models]

    def get(self, digest: str) -> Fetch | None:
        """Return the fetch of a blob, if there is one."""
        return self._fetches.get(digest)

    def opened(self, event: events.BlobOpened) -> None:
        """Handle the store's answer about a blob."""
        fetch = self._fetches.get(event.digest)
        if fetch is None or fetch.stage is not Stage.LOOK:
            return
        if event.error is not None:
            self._end(fetch, error=event.error)
        elif event.complete:
            self._end(fetch, data=event.data)
        elif fetch.map_digest is None:
            self._pull(fetch, Stage.BLOCKS, Transfer(fetch.digest, BlobKind.BLOB, fetch.size, fetch.digest))
        elif event.block_map is None:
            size = block_count(fetch.size) * HASH_SIZE
            self._pull(fetch, Stage.MAP, Transfer(fetch.digest, BlobKind.MAP, size, fetch.map_digest))
        else:
            transfer = Transfer(
                fetch.digest, BlobKind.BLOB, fetch.size, fetch.digest, hashes=event.block_map, have=event.have
            )
            self._pull(fetch, Stage.BLOCKS, transfer)

    def block(self, rid: str, answer: BlockAnswer, now: float) -> Fetch | None:
        """Handle an answer; return its fetch if it brought something new."""
        transfer = self.traffic.answered(rid, answer, now)
        fetch = self._fetches.get(transfer.digest) if transfer is not None else None
        if transfer is None or fetch is None:
            return None
        if answer.status is BlockStatus.BUSY:
            self.traffic.busy(transfer, answer.index, now)
            return None
        if answer.status is not BlockStatus.OK:
            reason = answer.reason or answer.status.name.lower().replace("_", " ")
            self._end(fetch, error=f"the controller does not give {transfer.kind.value} {fetch.digest}: {reason}")
            return None
        verdict, places = transfer.accept(answer.index, answer.payload)
        if verdict is Verdict.BROKEN and transfer.given_up(answer.index):
            self._end(fetch, error=f"block {answer.index} of {fetch.digest} came broken again and again")
        if verdict is not Verdict.NEW:
            return None
        transfer.busy = 0
        if transfer.on_disk:
            for index in places:
                self._emit(actions.WriteBlock(fetch.digest, index, answer.payload))
        if transfer.finished:
            self._complete(fetch, transfer)
        return fetch

    def stored(self, event: events.BlobStored) -> None:
        """Handle the store's result for a blob."""
        fetch = self._fetches.get(event.digest)
        if fetch is not None and fetch.stage is Stage.CHECK:
            self._end(fetch, data=fetch.data, error=event.error)

    def write_failed(self, event: events.WriteFailed) -> None:
        """Handle a block that could not be written."""
        fetch = self._fetches.get(event.digest)
        if fetch is not None:
            self._end(fetch, error=event.error)

    def _pull(self, fetch: Fetch, stage: Stage, transfer: Transfer) -> None:
        fetch.stage = stage
        fetch.transfer = transfer
        self.traffic.add(transfer)
        if transfer.finished:
            self._complete(fetch, transfer)

    def _complete(self, fetch: Fetch, transfer: Transfer) -> None:
        if transfer.on_disk:
            fetch.stage = Stage.CHECK
            self._forget_transfer(fetch)
            self._emit(actions.FinishBlob(fetch.digest))
            return
        data = transfer.data()
        if data is None:
            # An empty blob has no block that could be asked for again.
            if transfer.given_up(0) or transfer.count == 0:
                what = "block map" if transfer.kind is BlobKind.MAP else "blob"
                self._end(fetch, error=f"the {what} of {fetch.digest} came with a wrong digest again and again")
            return
        self._forget_transfer(fetch)
        if transfer.kind is BlobKind.MAP:
            fetch.stage = Stage.LOOK
            self._emit(
                actions.OpenBlob(
                    digest=fetch.digest, size=fetch.size, map_digest=fetch.map_digest, block_map=data, read=fetch.read
                )
            )
            return
        fetch.stage = Stage.CHECK
        fetch.data = data if fetch.read else None
        self._emit(actions.StoreBlob(fetch.digest, data))

    def _end(self, fetch: Fetch, *, data: bytes | None = None, error: str | None = None) -> None:
        self._stop(fetch)
        if error is not None:
            self._emit(actions.CloseBlob(fetch.digest))
        self.outcomes.append(Outcome(fetch.digest, frozenset(fetch.models), data, error))

    def _stop(self, fetch: Fetch) -> None:
        self._forget_transfer(fetch)
        if self._fetches.get(fetch.digest) is fetch:
            del self._fetches[fetch.digest]

    def _forget_transfer(self, fetch: Fetch) -> None:
        if fetch.transfer is not None:
            self.traffic.drop(fetch.transfer)
            fetch.transfer = None
