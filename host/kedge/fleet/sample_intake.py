"""Takes the samples that devices send: writes their chunks to files, answers them, and checks what is whole.

::

    STATE/samples/RID/DEVICE-CHECKSUM.part   what came so far
    STATE/samples/RID/DEVICE.frames          whole, and checked

Only what was asked for is taken, and no byte more. Chunks come in order: one that does not continue the file is
answered with what is there.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import deque
from pathlib import Path

from kedge.fleet import audit, sample_parts
from kedge.fleet.database import Database, Row, Session
from kedge_protocol import codec, files, frames, topics
from kedge_protocol.channel import Channel
from kedge_protocol.errors import KedgeError, MessageError, StorageError
from kedge_protocol.messages import Command
from kedge_protocol.samples import STREAM, SampleChunk, decode_chunk

log = logging.getLogger(__name__)

MAX_WAITING = 256
"""Chunks that wait at most; what is dropped comes again."""
LOOK_SECONDS = 2.0
"""Between two looks for requests whose time is over."""

_PART = """
SELECT part.*, rid, asked.id AS request FROM sample_part AS part JOIN sample_request AS asked ON asked.id = request_id
JOIN device ON device.id = device_id
WHERE rid = ? AND device.name = ? AND NOT removed
"""
_LATE = """
SELECT request_id, device_id FROM sample_part JOIN sample_request ON id = request_id
WHERE sample_part.state IN ('asked', 'collecting', 'sending') AND ends_at < ?
"""


class SampleIntake:
    """Takes chunks on the connection's thread and works on the controller's.

    Args:
        state: the state folder.
        connection: over which chunks are answered.
    """

    def __init__(self, state: Path, database: Database, connection: Channel) -> None:
        self._folder = state / "samples"
        self._database = database
        self._connection = connection
        self._waiting: deque[tuple[str, bytes]] = deque(maxlen=MAX_WAITING)
        self._lock = threading.Lock()
        self._looked = 0.0

    def put(self, device: str, payload: bytes) -> None:
        """Add a chunk."""
        with self._lock:
            self._waiting.append((device, payload))

    def tick(self) -> None:
        """Work on what came, and end what is late.

        Raises:
            StorageError: the disk is full or not writable.
        """
        with self._lock:
            waiting, self._waiting = self._waiting, deque(maxlen=MAX_WAITING)
        for device, payload in waiting:
            try:
                self._one(device, decode_chunk(payload, where=f"samples of {device}"))
            except MessageError as error:
                log.warning("%s", error)
        now = self._database.clock()
        if abs(now - self._looked) >= LOOK_SECONDS:
            self._looked = now
            self._end_late(now)

    def _one(self, device: str, chunk: SampleChunk) -> None:
        topics.checked_name(device, "device name")
        with self._database.read() as session:
            part = session.row(_PART, (chunk.rid, device))
        if part is None or chunk.total > part["max_bytes"]:
            raise MessageError("more samples came than were asked for", where=device)
        if part["state"] == sample_parts.DONE:
            self._answer(device, chunk.rid, chunk.total)
        elif part["state"] in sample_parts.OPEN:
            self._answer(device, chunk.rid, self._append(device, chunk, part))

    def _append(self, device: str, chunk: SampleChunk, part: Row) -> int:
        """Write a chunk; return how many bytes are there."""
        folder = self._folder / chunk.rid
        path = folder / f"{device}-{chunk.checksum.hex()[:16]}.part"
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            size = path.stat().st_size if path.exists() else 0
            if size == chunk.offset < chunk.total:
                with path.open("ab") as file:
                    file.write(chunk.payload)
                size += len(chunk.payload)
            if size < chunk.total:
                return size
            return self._whole(device, chunk, part, path)
        except OSError as error:
            raise StorageError(f"samples cannot be written: {error.strerror}", where=str(path)) from error

    def _whole(self, device: str, chunk: SampleChunk, part: Row, path: Path) -> int:
        raw = path.read_bytes()
        try:
            if len(raw) != chunk.total or hashlib.sha256(raw).digest() != chunk.checksum:
                raise MessageError("the checksum is another", where=device)
            samples = [frames.decode(*frame) for frame in frames.split(raw)]
            if len(samples) > part["count"]:
                raise MessageError("there are more samples than were asked for", where=device)
        except KedgeError as error:
            path.unlink()
            self._end(part, sample_parts.FAILED, f"what came is broken: {error}")
            return 0
        files.flush(path)
        path.rename(path.with_name(f"{device}.frames"))
        self._end(part, sample_parts.DONE, "", samples=len(samples), size=len(raw), device=device)
        return len(raw)

    def _end(self, part: Row, state: str, detail: str, *, samples: int = 0, size: int = 0, device: str = "") -> None:
        with self._database.write() as session:
            session.run(
                "UPDATE sample_part SET state = ?, detail = ?, samples = ?, size = ?"
                " WHERE request_id = ? AND device_id = ?",
                (state, detail or part["detail"], samples, size, part["request_id"], part["device_id"]),
            )
            if state == sample_parts.DONE:
                evidence = {"device": device, "samples": samples, "bytes": size}
                self._note(session, "samples.received", part["request_id"], evidence)
            sample_parts.over(session, [part["device_id"]])

    def _end_late(self, now: float) -> None:
        with self._database.read() as session:
            late = session.rows(_LATE, (now,))
        if not late:
            return
        with self._database.write() as session:
            session.run_many(
                "UPDATE sample_part SET state = 'silent', detail = 'it did not answer, or did not end, in time'"
                " WHERE request_id = ? AND device_id = ? AND state IN ('asked', 'collecting', 'sending')",
                [(row["request_id"], row["device_id"]) for row in late],
            )
            for request in sorted({row["request_id"] for row in late}):
                count = sum(row["request_id"] == request for row in late)
                self._note(session, "samples.late", request, {"devices": count})
            sample_parts.over(session, [row["device_id"] for row in late])

    @staticmethod
    def _note(session: Session, action: str, request: int, evidence: dict[str, object]) -> None:
        audit.append(session, audit.CONTROLLER, action, f"samples {request}", evidence)

    def _answer(self, device: str, rid: str, received: int) -> None:
        command = Command(cid=rid, verb=STREAM, received=received)
        self._connection.publish(topics.command(device, f"{STREAM}-{rid}"), codec.encode(command))
