"""The block server: answers requests for blocks of published blobs, one block per message, as fast as the broker takes
them."""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from kedge.fleet.fair_queue import FairQueue, Job
from kedge.fleet.inbox import SeldomLog
from kedge.fleet.storage import Repository
from kedge.fleet.transfer_counts import TransferCounts
from kedge_protocol import codec, topics
from kedge_protocol.bitmaps import decode_bitmap
from kedge_protocol.blocks import (
    BLOCK_SIZE,
    HASH_SIZE,
    BlockStatus,
    block_count,
    block_length,
    encode_answer,
)
from kedge_protocol.errors import MessageError
from kedge_protocol.messages import BlobKind, BlockRequest

log = logging.getLogger(__name__)

MAX_BLOCKS_A_REQUEST = 256
"""Largest number of indices in one request."""
OPEN_FILES = 64
"""Number of blobs and maps that are kept open."""
WINDOW_BYTES = 1024 * 1024
"""Payload bytes that may wait for the socket: enough to keep it busy, few enough to keep the turns fair."""


class Outlet(Protocol):
    """The part of :class:`kedge_protocol.mqtt.Connection` that the server needs."""

    @property
    def connected(self) -> bool:
        """Return whether anything can be sent."""

    def publish(self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False) -> bool:
        """Send a message; return False if it was not accepted."""

    def wait_sent(self, below: int, timeout: float) -> bool:
        """Wait until fewer bytes than ``below`` wait for the socket."""


@dataclass(frozen=True)
class Client:
    """A served device: its number in the database, the bundles it should have, and those in its report."""

    number: int
    desired: frozenset[str]
    reported: Callable[[], frozenset[str]]


class BlockServer:
    """The block server. Requests arrive on the connection's thread (:meth:`request`); a separate thread reads and
    sends.

    Args:
        repository: where blobs and maps lie.
        counts: told of every request and every block.
        outlet: the connection.
    """

    def __init__(self, repository: Repository, counts: TransferCounts, outlet: Outlet) -> None:
        self._repository = repository
        self._counts = counts
        self._outlet = outlet
        self._clients: Mapping[str, Client] = {}
        self._blobs: Mapping[str, int] = {}
        self._bundles: Mapping[str, frozenset[str]] = {}
        self._turns = FairQueue()
        self._open: OrderedDict[tuple[str, BlobKind], int] = OrderedDict()
        self._seldom = SeldomLog()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="blocks", daemon=True)

    def know(
        self, clients: Mapping[str, Client], blobs: Mapping[str, int], bundles: Mapping[str, frozenset[str]]
    ) -> None:
        """Set the devices to serve, by name, and what they may get: blob → bytes, bundle → blobs."""
        self._clients, self._blobs, self._bundles = clients, blobs, bundles

    def start(self) -> None:
        """Start sending."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread; queued blocks are not sent."""
        self._stopping.set()
        self._turns.clear()
        if self._thread.is_alive():
            self._thread.join(5.0)

    def send_waiting(self) -> None:
        """Send all queued blocks in the caller's thread, instead of :meth:`start`'s."""
        while (job := self._turns.take(0.0)) is not None:
            self._send(job)

    def clear(self) -> None:
        """Drop the queue: devices ask again on a new connection."""
        self._turns.clear()

    def request(self, device: str, rid: str, payload: bytes) -> None:
        """Take one request.

        Raises:
            MessageError: it is none, or it has no ``rid`` to answer to.
        """
        client = self._clients.get(device)
        if client is None:
            return
        where = f"request of {device}"
        if not rid:
            raise MessageError("its topic names no request", where=where)
        request = codec.decode(payload, BlockRequest, where=where)
        have = int.from_bytes(decode_bitmap(request.have, where=where), "little")
        size = self._blobs.get(request.digest)
        if size is None:
            self._refuse(device, rid, request.blocks, BlockStatus.NOT_FOUND, "no published bundle has this blob")
            return
        if not self._may_have(client, request.digest):
            reason = "it is of no bundle that this device is to have or reported"
            self._refuse(device, rid, request.blocks, BlockStatus.NOT_FOUND, reason)
            return
        count = block_count(_size_of(request.kind, size))
        if len(request.blocks) > MAX_BLOCKS_A_REQUEST or any(not 0 <= index < count for index in request.blocks):
            reason = f"there are blocks 0 to {count - 1}, {MAX_BLOCKS_A_REQUEST} a request"
            self._refuse(device, rid, request.blocks, BlockStatus.REFUSED, reason if count else "it has no blocks")
            return
        have &= (1 << count) - 1
        if have:
            self._counts.told((client.number, request.digest, request.kind), have)
        full = self._turns.ask(device, rid, request.boot_id, request.digest, request.kind, request.blocks, have)
        if full:
            self._refuse(device, rid, full, BlockStatus.BUSY, "too many blocks wait for this device")

    def _may_have(self, client: Client, blob: str) -> bool:
        none: frozenset[str] = frozenset()
        return any(
            blob in self._bundles.get(bundle, none) for told in (client.desired, client.reported()) for bundle in told
        )

    def _refuse(self, device: str, rid: str, indices: list[int], status: BlockStatus, reason: str) -> None:
        self._seldom.warning(f"{device} {status}", "%s: %s: %s", device, status.name, reason)
        topic = topics.block(device, rid)
        for index in indices[:MAX_BLOCKS_A_REQUEST]:
            if 0 <= index < 1 << 32:
                self._outlet.publish(topic, encode_answer(index, reason.encode(), status))

    def _run(self) -> None:
        while not self._stopping.is_set():
            # First room, then the choice: what is chosen late is chosen with the newest knowledge.
            if not self._outlet.wait_sent(WINDOW_BYTES, 0.5):
                if not self._outlet.connected:
                    self._stopping.wait(0.05)
                continue
            job = self._turns.take(0.5)
            if job is None:
                continue
            try:
                self._send(job)
            except Exception:
                # One blob that cannot be read must not end the service of the others.
                log.exception("block %d of %s was not sent", job.index, job.digest)
        self._close_files()

    def _send(self, job: Job) -> None:
        client, size = self._clients.get(job.device), self._blobs.get(job.digest)
        if client is None or size is None:
            return
        length = block_length(_size_of(job.kind, size), job.index)
        topic = topics.block(job.device, job.rid)
        try:
            payload = os.pread(self._file(job), length, job.index * BLOCK_SIZE)
        except OSError as error:
            payload = b""
            self._seldom.warning(f"read {job.digest}", "%s cannot be read: %s", job.digest, error.strerror)
        if len(payload) != length:
            reason = b"the controller cannot read this block"
            self._outlet.publish(topic, encode_answer(job.index, reason, BlockStatus.REFUSED))
            return
        key = (client.number, job.digest, job.kind)
        again = self._counts.finished(key, job.index)
        try:
            taken = self._outlet.publish(topic, encode_answer(job.index, payload))
        except MessageError as error:
            self._seldom.warning("size", "a block cannot be sent: %s", error)
            self._outlet.publish(topic, encode_answer(job.index, str(error).encode(), BlockStatus.REFUSED))
            return
        if taken:
            self._counts.served(key, job.index, length, again=again)

    def _file(self, job: Job) -> int:
        key = (job.digest, job.kind)
        if (file := self._open.get(key)) is not None:
            self._open.move_to_end(key)
            return file
        is_map = job.kind is BlobKind.MAP
        path = self._repository.map_path(job.digest) if is_map else self._repository.blob_path(job.digest)
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._open[key] = file
        if len(self._open) > OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        return file

    def _close_files(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])


def _size_of(kind: BlobKind, blob_size: int) -> int:
    """Return the bytes of a blob or of its map; a blob of one block has no map."""
    if kind is BlobKind.BLOB:
        return blob_size
    count = block_count(blob_size)
    return count * HASH_SIZE if count > 1 else 0
