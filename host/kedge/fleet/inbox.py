"""Takes the devices' messages from the wire to the database: checks them, orders them, and writes them in one
transaction per round.

Nothing that a device sends may hurt the others: what is wrong is logged, seldom, and dropped.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from kedge.fleet.database import Clock
from kedge.fleet.presence import Presence, after_status, after_word
from kedge_protocol import codec, digest, topics
from kedge_protocol.errors import KedgeError, MessageError
from kedge_protocol.messages import Ack, Latency, Reported, Status, Telemetry

log = logging.getLogger(__name__)

MAX_WAITING = 20_000
"""Largest number of messages between two rounds; beyond it the oldest are dropped."""
MAX_NUMBER = 1 << 53
"""No count in a message is larger: JSON readers and the database agree up to here."""
MAX_MILLISECONDS = 1e8
"""No call takes longer: more than a day."""
MAX_BOOT_ID = 128
"""Characters."""
TELEMETRY_A_ROUND = 8
"""Telemetry messages of one device that one round keeps."""
SEEN_SECONDS = 60.0
"""A device that only sends telemetry is noted as seen this often, not with each message."""


class SeldomLog:
    """Logs each kind of problem at most once in ``seconds``, with the number of occurrences since."""

    def __init__(self, seconds: float = 10.0) -> None:
        self._seconds = seconds
        self._last: dict[str, tuple[float, int]] = {}

    def warning(self, kind: str, message: str, *arguments: object) -> None:
        """Log ``message`` unless this ``kind`` was logged shortly before."""
        now = time.monotonic()
        last, skipped = self._last.get(kind, (-self._seconds, 0))
        if now - last < self._seconds:
            self._last[kind] = (last, skipped + 1)
            return
        if len(self._last) > 1000:
            self._last.clear()
        self._last[kind] = (now, 0)
        log.warning(message + (f" (and {skipped} more)" if skipped else ""), *arguments)


@dataclass
class DeviceState:
    """The known state of one device.

    Attributes:
        number, added_at: of its row; another device of the same name has others.
        report: orders reports: boot and number.
        seen_at, noted_at: its last word, and that which the database knows of.
        bundles: in its last report: wanted, serving, kept.
    """

    number: int = 0
    added_at: float = 0.0
    presence: Presence = field(default_factory=Presence)
    report: tuple[str, int] = ("", -1)
    seen_at: float = 0.0
    noted_at: float = 0.0
    bundles: frozenset[str] = frozenset()


@dataclass
class Change:
    """The changes of one device found in a round.

    Attributes:
        touched: whether its presence, or when it was seen, is to be written.
        reported, view: its newest report, as it came and as it reads; None without one.
        telemetry: when each message came, and the message.
        measured: the same messages as they read.
    """

    memory: DeviceState
    touched: bool = False
    reported: bytes | None = None
    view: Reported | None = None
    acks: list[Ack] = field(default_factory=list)
    telemetry: list[tuple[float, bytes]] = field(default_factory=list)
    measured: list[tuple[float, Telemetry]] = field(default_factory=list)
    latencies: dict[str, Latency] = field(default_factory=dict)


class Inbox:
    """Takes messages on the connection's thread and digests them on the controller's.

    Args:
        clock: the fleet's clock, in seconds since 1970.
    """

    def __init__(self, clock: Clock = time.time) -> None:
        self._clock = clock
        self._waiting: deque[tuple[str, bytes, bool] | None] = deque(maxlen=MAX_WAITING)
        self._lock = threading.Lock()
        self._memory: dict[str, DeviceState] = {}
        self._strangers: set[str] = set()
        self._changes: dict[str, Change] = {}
        self._seldom = SeldomLog()

    def put(self, topic: str, payload: bytes, retained: bool) -> None:
        """Add a message."""
        with self._lock:
            self._waiting.append((topic, payload, retained))

    def put_break(self) -> None:
        """Note that the connection began or ended: until retained states arrive, no device is known to be online."""
        with self._lock:
            self._waiting.append(None)

    def known(self) -> dict[str, DeviceState]:
        """Return the served devices."""
        return self._memory

    def know(self, devices: dict[str, DeviceState]) -> None:
        """Set the served devices; known state is kept."""
        for name, memory in devices.items():
            known = self._memory.get(name)
            if known is not None and (known.number, known.added_at) == (memory.number, memory.added_at):
                devices[name] = known
        self._memory = devices
        self._changes = {name: change for name, change in self._changes.items() if devices.get(name) is change.memory}
        self._strangers -= devices.keys()

    def digest(self) -> dict[str, Change]:
        """Process the queued messages. The result stays until :meth:`written`, so that a failed write loses nothing."""
        with self._lock:
            waiting, self._waiting = self._waiting, deque(maxlen=MAX_WAITING)
        for item in waiting:
            if item is None:
                self._all_away()
                continue
            topic, payload, retained = item
            try:
                self._one(topic, payload, retained)
            except (KedgeError, RecursionError) as error:
                self._seldom.warning(topic.rpartition("/")[0], "a message was dropped: %s", error)
            except Exception:
                log.exception("a message on %s was dropped", topic[:120])
        return self._changes

    def written(self) -> None:
        """Confirm that the result of :meth:`digest` is in the database."""
        self._changes = {}

    def _all_away(self) -> None:
        for name, memory in self._memory.items():
            if memory.presence.online:
                known = memory.presence
                memory.presence = Presence(False, known.boot_id, known.session)
                self._change(name, memory).touched = True

    def _change(self, name: str, memory: DeviceState) -> Change:
        return self._changes.setdefault(name, Change(memory))

    def _one(self, raw_topic: str, payload: bytes, retained: bool) -> None:
        topic = topics.parse(raw_topic)
        memory = self._memory.get(topic.device)
        if memory is None:
            self._note_stranger(topic.device)
            return
        if not payload:
            return  # a retained message was cleared
        check_text(payload, where=raw_topic)
        if topic.kind == "status":
            self._status(topic.device, memory, codec.decode(payload, Status, where=raw_topic))
        elif topic.kind == "reported":
            view = codec.decode(payload, Reported, where=raw_topic)
            self._reported(topic.device, memory, view, payload, retained)
        elif topic.kind == "tele":
            self._telemetry(topic.device, memory, codec.decode(payload, Telemetry, where=raw_topic), payload)
        elif topic.kind == "ack":
            ack = codec.decode(payload, Ack, where=raw_topic)
            self._change(topic.device, memory).acks.append(ack)
            log.info("%s: command %s %s %s", topic.device, ack.cid, "done" if ack.ok else "failed", ack.detail)

    def _note_stranger(self, device: str) -> None:
        if device not in self._strangers and len(self._strangers) < 1000:
            self._strangers.add(device)
            log.warning("%s is not a known device and is not served; add it: kedge device add %s", device, device)

    def _status(self, name: str, memory: DeviceState, status: Status) -> None:
        _check(status.boot_id, status.session, where=f"status of {name}")
        before, memory.presence = memory.presence, after_status(memory.presence, status)
        if memory.presence != before:
            memory.seen_at = self._clock()
            self._change(name, memory).touched = True
            if before.online != memory.presence.online:
                log.info("%s is %s", name, "there" if memory.presence.online else "away")

    def _reported(self, name: str, memory: DeviceState, reported: Reported, payload: bytes, retained: bool) -> None:
        where = f"report of {name}"
        _check(reported.boot_id, reported.seq, reported.desired_version, where=where)
        if not retained:
            self._word(name, memory, reported.boot_id)
        boot, seq = memory.report
        if reported.boot_id == boot and reported.seq <= seq:
            return
        # A broker that came back with an old store may show a report from before the device's present boot.
        if retained and boot == memory.presence.boot_id != reported.boot_id and boot:
            return
        memory.report = (reported.boot_id, reported.seq)
        memory.bundles = frozenset(_bundles(reported))
        change = self._change(name, memory)
        change.touched, change.reported, change.view = True, payload, reported
        for model in reported.models.values():
            for latency in (model.latency, *(one.latency for one in model.candidates)):
                if latency is not None and _sound(latency):
                    change.latencies[latency.bundle] = latency

    def _telemetry(self, name: str, memory: DeviceState, telemetry: Telemetry, payload: bytes) -> None:
        _check(telemetry.boot_id, telemetry.seq, where=f"telemetry of {name}")
        self._word(name, memory, telemetry.boot_id)
        change, now = self._change(name, memory), self._clock()
        change.telemetry.append((now, payload))
        change.measured.append((now, telemetry))
        del change.telemetry[:-TELEMETRY_A_ROUND], change.measured[:-TELEMETRY_A_ROUND]

    def _word(self, name: str, memory: DeviceState, boot_id: str) -> None:
        before, memory.presence = memory.presence, after_word(memory.presence, boot_id)
        memory.seen_at = self._clock()
        if memory.presence != before or memory.seen_at - memory.noted_at > SEEN_SECONDS:
            self._change(name, memory).touched = True


def _bundles(reported: Reported) -> Iterator[str]:
    for model in reported.models.values():
        for bundle in (model.desired, model.digest, model.previous):
            if bundle:
                yield bundle


def check_text(payload: bytes, *, where: str) -> None:
    """Refuse text that JSON can hold but UTF-8 cannot: half a surrogate pair.

    Raises:
        MessageError: there is one.
    """
    if b"\\ud" not in payload.lower():
        return
    try:
        json.dumps(codec.loads(payload, where=where), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise MessageError("its text is no Unicode", where=where) from error


def _sound(latency: Latency) -> bool:
    """Return whether a measurement is plausible: valid digests and finite times (JSON may hold NaN and infinity)."""
    try:
        digest.checked(latency.bundle, where="latency")
        digest.checked(latency.files, where="latency")
    except KedgeError:
        return False
    return 0 <= latency.p50_ms <= latency.p95_ms < MAX_MILLISECONDS and 0 < latency.calls < MAX_NUMBER


def _check(boot_id: str, *numbers: int, where: str) -> None:
    if not boot_id or len(boot_id) > MAX_BOOT_ID:
        raise MessageError("its boot_id is empty or too long", where=where)
    if any(not 0 <= number < MAX_NUMBER for number in numbers):
        raise MessageError("a count is out of range", where=where)
