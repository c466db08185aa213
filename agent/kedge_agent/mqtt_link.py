"""The agent's MQTT link: received messages become events of the update machine; sent messages stay below the size
limit."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

from kedge_agent.name_conflict import NameConflict
from kedge_agent.update import actions, events
from kedge_protocol import codec, samples, topics
from kedge_protocol.blocks import MAX_MESSAGE_BYTES, decode_answer
from kedge_protocol.broker import Broker
from kedge_protocol.channel import Channel
from kedge_protocol.errors import KedgeError, MessageError
from kedge_protocol.messages import Ack, Command, Reported, Status, Telemetry
from kedge_protocol.mqtt import Connection

log = logging.getLogger(__name__)

MAX_REASON = 1500
"""Largest number of characters of a failure's reason on the wire; the full text is in the agent's log."""
ECHO_SECONDS = 15.0
"""Seconds after which an unheard own status is logged."""
_REMEMBERED_COMMANDS = 256


class Link:
    """The MQTT topics of one device.

    Args:
        broker: the broker's address and credentials.
        name: name of the device, and of the MQTT client.
        boot_id: boot id of this start.
        post: called with events for the update machine.
        command: runs a verb; returns None, or the reason if it fails.
        conflict: detects another device with this name.
        samples: called with the controller's answers to chunks of samples: the request, and the bytes that it has.
        noticed: called when another device is detected, or is gone.
        clock: this device's clock, in seconds since 1970.
        connect: makes the connection; a simulation gives its own.
    """

    def __init__(
        self,
        broker: Broker,
        name: str,
        boot_id: str,
        *,
        post: Callable[[events.Event], None],
        command: Callable[[str], str | None],
        conflict: NameConflict | None = None,
        noticed: Callable[[], None] = lambda: None,
        samples: Callable[[str, int], None] = lambda *_: None,
        clock: Callable[[], float] = time.time,
        connect: Callable[..., Channel] = Connection,
    ) -> None:
        self._name = name
        self._boot_id = boot_id
        self._post = post
        self._command = command
        self._conflict = conflict or NameConflict(boot_id)
        self._noticed = noticed
        self._samples = samples
        self._clock = clock
        self._answers = topics.block(name, "")
        self._done: OrderedDict[str, Ack] = OrderedDict()
        self._session = 0
        self._stopping = False
        self._unheard = False
        self._broken = 0
        self._echo_due: float | None = None
        self.connection: Channel = connect(
            broker,
            name,
            will_topic=topics.status(name),
            will_payload=lambda session: self._status(session, online=False),
            subscriptions=[
                topics.desired(name),
                topics.command(name, "+"),
                topics.CONTROLLER_STATUS,
                topics.status(name),
                # Bulk: a lost block is asked for again, so the broker need not keep it.
                (topics.block(name, "+"), 0),
            ],
            on_connected=self._connected,
            on_disconnected=self._disconnected,
            on_message=self._message,
        )

    def start(self) -> None:
        """Connect and stay connected."""
        self.connection.start()

    def stop(self) -> None:
        """Announce that the device goes offline, and disconnect."""
        self._stopping = True
        self.connection.stop()

    def ask(self, action: actions.RequestBlocks) -> None:
        """Publish a request with QoS 0; the update machine asks again after a broken connection."""
        self.connection.publish(topics.request(self._name, action.rid), codec.encode(action.request))

    def reported(self, state: Reported) -> None:
        """Publish the reported state; long reasons are shortened so that it stays below the limit."""
        longest = MAX_REASON
        while True:
            payload = codec.encode(_shortened(state, longest))
            if len(payload) <= MAX_MESSAGE_BYTES or longest < 8:
                break
            longest //= 2
        try:
            self.connection.publish(topics.reported(self._name), payload, qos=1, retain=True)
        except MessageError as error:
            log.error("the reported state cannot be sent: %s", error)

    def telemetry(self, message: Telemetry) -> None:
        """Publish telemetry if connected."""
        try:
            self.connection.publish(topics.telemetry(self._name, "metrics"), codec.encode(message))
        except MessageError as error:
            log.error("telemetry cannot be sent: %s", error)

    def samples(self, chunk: samples.SampleChunk) -> None:
        """Publish a part of the samples that the device was asked for; a lost one is sent again."""
        self.connection.publish(topics.telemetry(self._name, samples.STREAM), chunk.encode())

    def watch(self, now: float) -> None:
        """Check that the broker delivers this device's topics: some accept every subscription and then drop forbidden
        messages. If the device does not hear its own status, the log says why nothing works.

        Args:
            now: seconds of a monotonic clock.
        """
        if self._conflict.watch(now):
            log.info("the other device named %s is gone", self._name)
            self._noticed()
        if not self._unheard:
            self._echo_due = None
        elif self._echo_due is None:
            self._echo_due = now + ECHO_SECONDS
        elif now >= self._echo_due:
            self._unheard = False
            log.error(
                "%s lets nothing through on %s; see its access rules for this user and name",
                self.connection.broker.url,
                topics.status(self._name),
            )

    def _status(self, session: int, *, online: bool) -> bytes:
        return codec.encode(Status(online=online, boot_id=self._boot_id, session=session, at=self._clock()))

    def _connected(self, session: int) -> None:
        self._session = session
        self._unheard = True
        self._say_online()
        self._post(events.Connected())

    def _say_online(self) -> None:
        self.connection.publish(topics.status(self._name), self._status(self._session, online=True), qos=1, retain=True)

    def _disconnected(self, reason: str) -> None:
        self._unheard = False
        self._post(events.Disconnected())

    def _message(self, topic: str, payload: bytes, retained: bool) -> None:
        try:
            if topic.startswith(self._answers):
                answer = decode_answer(payload)
                self._post(events.BlockArrived(topic[len(self._answers) :], answer))
            elif topic == topics.CONTROLLER_STATUS:
                self._post(events.ControllerSeen(codec.decode(payload, Status, where=topic)))
            elif topic == topics.desired(self._name):
                # Empty: nothing is wanted of this device any more, and what it has it keeps.
                if payload:
                    self._post(events.DesiredArrived(payload))
            elif topic == topics.status(self._name):
                self._own_status(codec.decode(payload, Status, where=topic))
            elif not retained:
                # A retained command would be done again on each connection; nobody may leave one.
                self._do(codec.decode(payload, Command, where=topic))
        except KedgeError as error:
            self._broken += 1
            if self._broken & (self._broken - 1) == 0:
                log.warning("%s (%d such messages so far)", error, self._broken)

    def _own_status(self, status: Status) -> None:
        self._unheard = False
        if self._conflict.heard(status.boot_id):
            log.error(
                "another device uses the name %s (boot %s): they throw each other off the broker. Rename one",
                self._name,
                status.boot_id,
            )
            self._noticed()
        # The will of an earlier connection may come after this one's birth: the device must not look dead for it.
        if not status.online and not self._stopping:
            log.info("a late will called this device offline; saying that it is online")
            self._say_online()

    def _do(self, command: Command) -> None:
        if command.verb == samples.STREAM:
            self._samples(command.cid, command.received)
            return
        topics.checked_name(command.cid, "command id")
        ack = self._done.get(command.cid)
        if ack is None:
            problem = self._command(command.verb)
            ack = Ack(cid=command.cid, ok=problem is None, detail=problem or "")
            self._done[command.cid] = ack
            while len(self._done) > _REMEMBERED_COMMANDS:
                self._done.popitem(last=False)
        self.connection.publish(topics.ack(self._name, command.cid), codec.encode(ack), qos=1)


def _shortened(state: Reported, longest: int) -> Reported:
    models = {}
    for name, model in state.models.items():
        failure = model.failure
        if failure is not None and len(failure.reason) > longest:
            model = replace(model, failure=replace(failure, reason=f"{failure.reason[:longest]} …"))
        models[name] = model
    return replace(state, models=models)
