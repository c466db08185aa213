"""One request for samples on this device, from its arrival to the controller's last answer. All that must survive a
restart is in its folder::

    FOLDER/request.json   the request, how far it is, and how long it has looked
    FOLDER/kept/          the samples chosen so far, see :mod:`kedge_agent.samples.reservoir`
    FOLDER/outbox         once it is sent: the file of frames
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from kedge_agent.samples.reservoir import RANKS, Reservoir
from kedge_protocol import codec, files, frames
from kedge_protocol.errors import KedgeError
from kedge_protocol.samples import CHUNK_BYTES, Choice, ReportedSamples, SampleChunk, SampleRequest, SampleState

WINDOW = 4
"""Chunks that are sent before an answer must come."""
SILENCE_SECONDS = 10.0
"""Without an answer for so long, what was not answered is sent again."""
_NOTE_SECONDS = 10.0
"""Between two notes of how long it has looked; what a restart can make it look longer."""
_REQUEST, _KEPT, _OUTBOX = "request.json", "kept", "outbox"


@dataclass(frozen=True, kw_only=True)
class _Note:
    """``request.json``.

    Attributes:
        looked: seconds.
        checksum: SHA-256 (hex) of the outbox.
    """

    request: SampleRequest
    state: SampleState = SampleState.COLLECTING
    looked: float = 0.0
    seen: int = 0
    kept: int = 0
    size: int = 0
    checksum: str = ""
    detail: str | None = None


class Collection:
    """A request under way.

    Args:
        folder: its own; another request's content is removed.
        request: what is asked for, within what this device allows.
        detail: what bounds it, in words.
        now: seconds of a monotonic clock, as in all calls.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, request: SampleRequest, *, detail: str | None, now: float) -> None:
        self._folder = folder
        note = _read(folder / _REQUEST)
        if note is None or note.request.rid != request.rid:
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(folder)
            folder.mkdir(parents=True, mode=0o700)
            note = _Note(request=request, detail=detail)
        self._note = note
        self._reservoir: Reservoir | None = None
        self._looked_at = self._noted_at = now
        self._answered = self._sent = 0
        self._sent_at = -SILENCE_SECONDS
        if note.state is SampleState.COLLECTING:
            limit = note.request
            self._reservoir = Reservoir(folder / _KEPT, count=limit.count, size=limit.max_bytes)
            self._write()

    @property
    def request(self) -> SampleRequest:
        """Return the request within this device's bounds."""
        return self._note.request

    @property
    def state(self) -> SampleState:
        """Return how far it is."""
        return self._note.state

    def reported(self) -> ReportedSamples:
        """Return what is reported of it."""
        note, kept = self._note, self._reservoir
        return ReportedSamples(
            rid=note.request.rid,
            state=note.state,
            seen=note.seen,
            kept=note.kept if kept is None else len(kept),
            size=note.size if kept is None else kept.size,
            detail=note.detail,
        )

    def show(self, head: bytes, body: bytes) -> None:
        """Take a sample's frame into account.

        Raises:
            KedgeError: it is none.
        """
        told = frames.read_head(head)
        if self._reservoir is None or not 0 < told.inputs_size <= len(body):
            return
        rank = self._rank(told)
        self._note = replace(self._note, seen=self._note.seen + 1)
        if rank is not None:
            try:
                self._reservoir.offer(rank, body[: told.inputs_size], head, body)
            except OSError as error:
                self._note = replace(self._note, detail=f"a sample cannot be kept: {error.strerror}")

    def _rank(self, told: frames.Head) -> int | None:
        if self.request.where is Choice.DISAGREE:
            return secrets.randbelow(RANKS) if told.disagrees else None
        sure = told.confidence
        return int(max(0.0, sure) * (RANKS - 1)) if sure is not None and sure < self.request.below else None

    def tick(self, now: float) -> bool:
        """Let time go by; return whether the time to look is over, and :meth:`finish` is due."""
        if self.state is not SampleState.COLLECTING:
            return False
        self._note = replace(self._note, looked=self._note.looked + max(0.0, now - self._looked_at))
        self._looked_at = now
        if now - self._noted_at >= _NOTE_SECONDS:
            self._noted_at = now
            self._write()
        return self._note.looked >= self.request.seconds

    def finish(self) -> int:
        """Stop looking, and make the file that is sent; return its bytes.

        Raises:
            OSError: it cannot be written.
        """
        if self._reservoir is None:
            return 0
        checksum, size = hashlib.sha256(), 0
        with files.new_file(self._folder / _OUTBOX, mode=0o600) as outbox:
            for frame in self._reservoir.frames():
                outbox.write(frame)
                checksum.update(frame)
                size += len(frame)
        state = SampleState.SENDING if size else SampleState.DONE
        kept, self._reservoir = len(self._reservoir), None
        self._note = replace(self._note, state=state, kept=kept, size=size, checksum=checksum.hexdigest())
        self._write()
        shutil.rmtree(self._folder / _KEPT, ignore_errors=True)
        return size

    def chunks(self, now: float) -> Iterator[SampleChunk]:
        """Yield what is to be sent now."""
        note = self._note
        if note.state is not SampleState.SENDING:
            return
        if now - self._sent_at >= SILENCE_SECONDS:
            self._sent = self._answered
        with (self._folder / _OUTBOX).open("rb") as outbox:
            while self._sent < min(note.size, self._answered + WINDOW * CHUNK_BYTES):
                outbox.seek(self._sent)
                payload = outbox.read(CHUNK_BYTES)
                yield SampleChunk(
                    rid=note.request.rid,
                    offset=self._sent,
                    total=note.size,
                    checksum=bytes.fromhex(note.checksum),
                    payload=payload,
                )
                self._sent += len(payload)
                self._sent_at = now

    def answered(self, received: int) -> None:
        """Handle the controller's answer: how many bytes it has.

        Raises:
            OSError: the end cannot be noted.
        """
        if self.state is not SampleState.SENDING or not 0 <= received <= self._note.size:
            return
        if received < self._answered or received > self._sent:
            self._sent = received
        self._answered = received
        if received == self._note.size:
            self._note = replace(self._note, state=SampleState.DONE)
            self._write()
            (self._folder / _OUTBOX).unlink(missing_ok=True)

    def fail(self, detail: str) -> None:
        """End it."""
        self._reservoir = None
        self._note = replace(self._note, state=SampleState.FAILED, detail=detail)
        for name in (_KEPT, _OUTBOX):
            path = self._folder / name
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._write()

    def _write(self) -> None:
        files.write(self._folder / _REQUEST, codec.encode(self._note), mode=0o600)


def _read(path: Path) -> _Note | None:
    try:
        return codec.decode(path.read_bytes(), _Note, where=str(path))
    except (OSError, KedgeError):
        return None
