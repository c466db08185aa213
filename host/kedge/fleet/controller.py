"""The controller publishes the database's desired states to the broker and records the devices' reports in the
database.

It holds no truth of its own. Verbs write to the database, from any process; the controller sees a change, publishes
what is new, and after every connection publishes everything, for a broker may have lost it.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from kedge.fleet import assigning
from kedge.fleet.block_server import BlockServer, Client
from kedge.fleet.controller_lock import only_controller
from kedge.fleet.controller_store import ControllerStore
from kedge.fleet.database import Clock, Database, state_folder
from kedge.fleet.drift import Alarms
from kedge.fleet.embedded_broker import EmbeddedBroker
from kedge.fleet.health import Mark
from kedge.fleet.inbox import Inbox, SeldomLog
from kedge.fleet.options import ControllerOptions
from kedge.fleet.sample_intake import SampleIntake
from kedge.fleet.staged.engine import Engine
from kedge.fleet.storage import Repository
from kedge.fleet.transfer_counts import TransferCounts
from kedge_protocol import codec, samples, topics
from kedge_protocol.channel import Channel
from kedge_protocol.errors import KedgeError, MessageError
from kedge_protocol.messages import Command, Status
from kedge_protocol.mqtt import Backoff, Broker, Connection

log = logging.getLogger(__name__)

TICK_SECONDS = 0.25
"""Seconds between two rounds; all messages between them are written in one transaction."""
DRIFT_SECONDS = 60.0
"""Seconds between two comparisons of the devices' sketches with the baselines."""
LOOK_SECONDS = 10.0
"""Between two looks at the database that no verb asked for: one may have died before it could."""
PUBLISHED_AT_ONCE = 256
"""Desired states that are read and published together."""
FLUSH_SECONDS = 0.5
"""Between two writes of the count of blocks; what a killed controller can lose of it."""
ADVANCE_SECONDS = 1.0
"""Between two rounds of the staged rollouts."""
CLOCK_STEP_SECONDS = 10.0
"""A larger step of the fleet's clock against the monotonic one is not time that went by."""
REMIND_SECONDS = 30.0
"""A device that is there and has not answered its desired state is told again after this."""
HELD_REMINDERS = 10
"""After so many the log says that somebody may hold it back."""


def run(state: Path | None, options: ControllerOptions) -> None:
    """Run a controller until SIGTERM or SIGINT.

    Args:
        state: the state folder; None for :func:`kedge.fleet.database.state_folder`'s choice.

    Raises:
        ConfigError: the options do not fit.
        FleetError: another controller runs on this state folder, or the embedded broker cannot start.
        StorageError: the state folder cannot be written.
    """
    broker = options.parsed()
    with _signals() as caught, contextlib.ExitStack() as stack:
        controller = stack.enter_context(Controller(state_folder(state), broker))
        if options.embedded:
            embedded = EmbeddedBroker(options.listen)
            embedded.start()
            # Before the controller leaves, so that its last words are heard.
            stack.callback(embedded.stop)
            stack.callback(controller.disconnect)
        controller.start()
        log.info("controller of %s at %s", controller.state, broker.url)
        while not caught:
            controller.tick()
            time.sleep(TICK_SECONDS)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Yield a flag that a stop signal sets. An event would not do: the code that the signal interrupts may hold its
    lock."""
    caught: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, lambda number, _: caught.append(number)) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Controller:
    """A controller, as a context manager. :meth:`tick` does all work outside the connection's thread, four times a
    second.

    Args:
        state: the state folder; only one controller at a time may use it.
        broker: where to connect.
        backoff: between attempts to connect.
        clock: the fleet's clock, in seconds since 1970.
        steady: a monotonic clock, in seconds.
        connect: makes the connection; a simulation gives its own.
        block_thread: whether a thread of its own sends blocks; without it, :meth:`tick` does.

    Raises:
        FleetError: another controller runs on this folder.
        StorageError: it cannot be written.
    """

    def __init__(
        self,
        state: Path,
        broker: Broker,
        *,
        backoff: Backoff | None = None,
        clock: Clock = time.time,
        steady: Clock = time.monotonic,
        connect: Callable[..., Channel] = Connection,
        block_thread: bool = True,
    ) -> None:
        self.state = state
        self.database = Database(state, clock=clock)
        self._steady = steady
        self._block_thread = block_thread
        self._folder = contextlib.ExitStack()
        self._folder.enter_context(only_controller(state))
        self._records = ControllerStore(self.database)
        self._inbox = Inbox(clock)
        self._counts = TransferCounts(self.database)
        self.boot_id = uuid.uuid4().hex
        self._connection = connect(
            broker,
            self._records.client_id(),
            will_topic=topics.CONTROLLER_STATUS,
            will_payload=lambda session: self._status(False, session),
            subscriptions=[
                *(f"{topics.ROOT}/d/+/{kind}" for kind in ("reported", "status")),
                *((f"{topics.ROOT}/d/+/{kind}/+", 0) for kind in ("tele", "req", "ack")),
                topics.CONTROLLER_STATUS,
            ],
            on_connected=self._connected,
            on_disconnected=self._disconnected,
            on_message=self._received,
            backoff=backoff,
        )
        self._blocks = BlockServer(Repository(state), self._counts, self._connection)
        self._samples = SampleIntake(state, self.database, self._connection)
        self._seldom = SeldomLog()
        self._mark = Mark(state)
        self._changes = -1
        self._wakened = -1
        self._looked = 0.0
        self._wanted: dict[str, int | None] = {}
        self._published: dict[str, int | None] = {}
        self._unpublished = False
        self._new_session = threading.Event()
        self._engine = Engine(self.database)
        self._advanced = -ADVANCE_SECONDS
        self._listening_since: float | None = None
        self._clock_offset = clock() - steady()
        self._flushed = self._reminded = self._drift_at = steady()
        self._reminders: Counter[str] = Counter()
        self._alarms = Alarms()

    def __enter__(self) -> Controller:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Connect and start serving."""
        self._records.nobody_is_there()
        self._read_changes()
        if self._block_thread:
            self._blocks.start()
        self._connection.start()

    def disconnect(self) -> None:
        """Announce the end and disconnect from the broker."""
        self._connection.stop()

    def stop(self) -> None:
        """Disconnect, write pending data, and release the folder."""
        self.disconnect()
        self._blocks.stop()
        try:
            self._inbox.put_break()
            self._write()
            self._counts.flush()
        except KedgeError as error:
            log.error("what devices said last could not be written: %s", error)
        finally:
            self.database.close()
            self._folder.close()

    # The controller's thread.

    def tick(self) -> None:
        """Run one round: write the devices' messages, look for changes, publish them. Disk errors are logged and
        retried in the next round."""
        try:
            self._write()
            self._samples.tick()
            self._advance()
            self._read_changes()
            self._publish()
            if not self._block_thread:
                self._blocks.send_waiting()
            if self._steady() - self._flushed >= FLUSH_SECONDS:
                self._flushed = self._steady()
                self._counts.flush()
            if self._steady() - self._drift_at >= DRIFT_SECONDS:
                self._drift_at = self._steady()
                self._alarms.look(self.database)
            self._mark.update(connected=self._connection.connected)
        except KedgeError as error:
            self._seldom.warning("tick", "a round was broken off: %s", error)

    def _write(self) -> None:
        changes = self._inbox.digest()
        if changes:
            self._records.write(changes)
            self._inbox.written()

    def _advance(self) -> None:
        """Carry the staged rollouts on. While nobody listens to devices, nothing is known of them."""
        steady, now = self._steady(), self.database.clock()
        since = self._listening_since
        if since is None or steady - self._advanced < ADVANCE_SECONDS:
            return
        self._advanced = steady
        if abs(now - steady - self._clock_offset) > CLOCK_STEP_SECONDS:
            # The fleet's clock was set: what went by on it is no silence of the devices.
            self._clock_offset, self._listening_since, since = now - steady, now, now
        self._engine.tick(now=now, listening_since=since)
        assigning.tick(self.database, now)

    def _read_changes(self) -> None:
        """Read the database if a command has signalled a change, and occasionally without a signal."""
        wakened, now = self.database.wakened(), self._steady()
        if wakened == self._wakened and now - self._looked < LOOK_SECONDS:
            return
        if self.database.changes() != self._changes:
            self._read_snapshot()
        self._wakened, self._looked = wakened, now

    def _read_snapshot(self) -> None:
        before = self._inbox.known()
        snapshot = self._records.snapshot(known=before)
        self._inbox.know(snapshot.memories)
        # What is known of a device that was removed and added again is not its own.
        self._counts.keep({one.number for name, one in snapshot.memories.items() if before.get(name) is one})
        none: frozenset[str] = frozenset()
        clients = {
            name: Client(memory.number, snapshot.desired.get(name, none), partial(getattr, memory, "bundles"))
            for name, memory in snapshot.memories.items()
        }
        self._blocks.know(clients, snapshot.blobs, snapshot.bundles)
        self._wanted = snapshot.versions
        self._changes = snapshot.changes
        self._unpublished = True

    def _publish(self) -> None:
        if self._new_session.is_set():
            self._new_session.clear()
            self._published.clear()
            self._unpublished = True
        if not self._connection.connected:
            return
        self._remind()
        if self._unpublished:
            due = [name for name, version in self._wanted.items() if self._published.get(name, -1) != version]
            self._unpublished = not self._publish_all(due) or not self._send_commands()

    def _remind(self) -> None:
        """Publish the desired state again to online devices that have not answered it."""
        if self._steady() - self._reminded >= REMIND_SECONDS:
            self._reminded = self._steady()
            lagging = self._records.lagging()
            self._reminders = Counter({name: self._reminders[name] + 1 for name in lagging})
            for name in lagging:
                self._published.pop(name, None)
                self._unpublished = True
                if self._reminders[name] == HELD_REMINDERS:
                    log.warning(
                        "%s is there and has not taken its desired state for %d minutes: the broker's access rules keep"
                        " it from the device, or whoever controls the broker does",
                        name,
                        HELD_REMINDERS * REMIND_SECONDS / 60,
                    )

    def _publish_all(self, due: list[str]) -> bool:
        """Publish the desired state of these devices; return False if the queue is full, and the rest follows in the
        next round."""
        for start in range(0, len(due), PUBLISHED_AT_ONCE):
            for publication in self._records.publications(due[start : start + PUBLISHED_AT_ONCE]):
                if not self._send(
                    topics.desired(publication.device), publication.payload, publication.device, retain=True
                ):
                    return False
                self._published[publication.device] = self._wanted[publication.device]
        return True

    def _send(self, topic: str, payload: bytes, device: str, *, retain: bool) -> bool:
        """Publish a message; return False if the queue is full. A message that can never be sent is logged and
        dropped."""
        try:
            return self._connection.publish(topic, payload, qos=1, retain=retain)
        except MessageError as error:
            self._seldom.warning(topic, "%s is not told what it shall do: %s", device, error)
            return True

    def _send_commands(self) -> bool:
        pending_commands = self._records.pending_commands()
        sent = []
        for pending in pending_commands:
            command = Command(cid=pending.cid, verb=pending.verb)
            if self._send(
                topics.command(pending.device, pending.cid), codec.encode(command), pending.device, retain=False
            ):
                sent.append(pending.cid)
        if sent:
            self._records.sent(sent)
        return len(sent) == len(pending_commands)

    # The connection's thread.

    def _status(self, online: bool, session: int) -> bytes:
        return codec.encode(Status(online=online, boot_id=self.boot_id, session=session, at=self.database.clock()))

    def _connected(self, session: int) -> None:
        self._blocks.clear()
        self._inbox.put_break()
        self._new_session.set()
        self._listening_since = self.database.clock()
        self._connection.publish(topics.CONTROLLER_STATUS, self._status(True, session), qos=1, retain=True)

    def _disconnected(self, reason: str) -> None:
        self._listening_since = None
        self._blocks.clear()
        self._inbox.put_break()

    def _received(self, topic: str, payload: bytes, retained: bool) -> None:
        if topic == topics.CONTROLLER_STATUS:
            self._heard_of_controller(payload)
            return
        device, kind, tail = _taken_apart(topic)
        if kind == "tele" and tail == samples.STREAM:
            self._samples.put(device, payload)
        elif kind != "req":
            self._inbox.put(topic, payload, retained)
        elif not retained:
            try:
                self._blocks.request(device, tail, payload)
            except (KedgeError, RecursionError) as error:
                self._seldom.warning(f"req {device}", "a request was dropped: %s", error)

    def _heard_of_controller(self, payload: bytes) -> None:
        """Correct a late will of an earlier connection, since devices would wait for a controller that is online."""
        try:
            status = codec.decode(payload, Status, where=topics.CONTROLLER_STATUS)
        except KedgeError:
            return
        session = self._connection.session
        if status.boot_id == self.boot_id and status.session == session:
            return
        if status.online and status.boot_id != self.boot_id:
            self._seldom.warning("second", "another controller is at this broker; only one may serve a fleet")
            return
        self._connection.publish(topics.CONTROLLER_STATUS, self._status(True, session), qos=1, retain=True)


def _taken_apart(topic: str) -> tuple[str, str, str]:
    """Return device, kind and tail of a subscribed topic. It is cheap, since it runs for each request."""
    parts = [*topic.split("/"), "", "", "", "", ""]
    return parts[3], parts[4], parts[5]
