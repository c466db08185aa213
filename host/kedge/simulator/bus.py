"""A message bus in virtual time, in the place of a broker: retained messages, wills, subscriptions, and a network that
loses and delays.

:class:`VirtualConnection` has the interface of :class:`kedge_protocol.mqtt.Connection`, so that the real controller and
the real link of the agent run on it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kedge.simulator.clock import Timer, VirtualClock
from kedge_protocol.blocks import MAX_MESSAGE_BYTES
from kedge_protocol.broker import Broker
from kedge_protocol.errors import MessageError
from kedge_protocol.mqtt import KEEPALIVE

WILL_SECONDS = 1.5 * KEEPALIVE
"""A broker sends the will of a lost connection after this."""
_RESEND_SECONDS = 5.0
_RECONNECT = (0.5, 30.0)
"""Seconds between two attempts to connect, doubled from the first to the last, as of a real connection."""


@dataclass
class Line:
    """A client's network.

    Attributes:
        is_cut: whether nothing goes through at present.
        loss: share of messages that are lost; those of QoS 1 come later.
        latency, jitter: seconds of a message.
    """

    is_cut: Callable[[], bool]
    loss: float = 0.0
    latency: float = 0.0
    jitter: float = 0.0


class Bus:
    """The broker's part.

    Args:
        clock: the simulation's time.
        chance: draws what the network does.
    """

    def __init__(self, clock: VirtualClock, chance: random.Random) -> None:
        self.clock = clock
        self.chance = chance
        self.messages = 0
        self.bytes = 0
        self._retained: dict[str, bytes] = {}
        self._subscribers: dict[str, list[VirtualConnection]] = {}

    def subscribe(self, client: VirtualConnection) -> None:
        """Add a client's subscriptions and send it the retained messages."""
        for topic, _ in client.subscriptions:
            self._subscribers.setdefault(topic, []).append(client)
        for topic, payload in self._retained_for(client):
            client.receive(topic, payload, 1, retained=True)

    def unsubscribe(self, client: VirtualConnection) -> None:
        """Forget a client's subscriptions."""
        for topic, _ in client.subscriptions:
            left = self._subscribers.get(topic, [])
            if client in left:
                left.remove(client)

    def route(self, topic: str, payload: bytes, qos: int, *, retain: bool) -> None:
        """Take a message from a client."""
        if retain and payload:
            self._retained[topic] = payload
        elif retain:
            self._retained.pop(topic, None)
        for pattern in _patterns(topic):
            for client in tuple(self._subscribers.get(pattern, ())):
                client.receive(topic, payload, qos, retained=False)

    def _retained_for(self, client: VirtualConnection) -> list[tuple[str, bytes]]:
        exact = [topic for topic, _ in client.subscriptions if "+" not in topic]
        found = [(topic, self._retained[topic]) for topic in exact if topic in self._retained]
        wild = {topic for topic, _ in client.subscriptions if "+" in topic}
        if any("/+/" in topic for topic in wild):
            # The controller: it hears of every device.
            found += [one for one in self._retained.items() if not wild.isdisjoint(_patterns(one[0]))]
        return found


def _patterns(topic: str) -> tuple[str, ...]:
    """Return the subscriptions that Kedge's clients may have for a topic."""
    parts = topic.split("/")
    if len(parts) == 5:
        return topic, f"kedge/v1/d/+/{parts[4]}"
    if len(parts) == 6:
        head = "/".join(parts[:5])
        return topic, f"{head}/+", f"kedge/v1/d/+/{parts[4]}/+"
    return (topic,)


class VirtualConnection:
    """One client's connection; see :class:`kedge_protocol.mqtt.Connection` for what the arguments mean.

    Args:
        bus: the broker.
        line: the client's network.
    """

    def __init__(
        self,
        bus: Bus,
        line: Line,
        broker: Broker,
        client_id: str,
        *,
        will_topic: str,
        will_payload: Callable[[int], bytes],
        subscriptions: Sequence[str | tuple[str, int]],
        on_connected: Callable[[int], None],
        on_disconnected: Callable[[str], None],
        on_message: Callable[[str, bytes, bool], None],
        **_: object,
    ) -> None:
        self.broker = broker
        self.client_id = client_id
        self.session = 0
        self.connected = False
        self.line = line
        self.subscriptions = [(item, 1) if isinstance(item, str) else item for item in subscriptions]
        self._bus = bus
        self._will_topic = will_topic
        self._will_payload = will_payload
        self._on_connected = on_connected
        self._on_disconnected = on_disconnected
        self._on_message = on_message
        self._will: Timer | None = None
        self._attempt: Timer | None = None
        self._failures = 0
        self._heard_until = self._said_until = 0.0

    def start(self) -> None:
        """Connect, now and again after each loss."""
        if self._attempt is None:
            self._attempt = self._bus.clock.later(self.line.latency, self._connect)

    def _connect(self) -> None:
        self._attempt = None
        if self.line.is_cut():
            self._again()
            return
        self.session += 1
        self._failures = 0
        if self._will is not None:
            # Whoever takes over its own lost connection makes the broker send its will first.
            self._will.cancel()
            self._send_will(self.session - 1)
        self.connected = True
        self._bus.subscribe(self)
        self._on_connected(self.session)

    def _again(self) -> None:
        first, last = _RECONNECT
        ceiling = min(last, first * 2.0**self._failures)
        self._failures = min(self._failures + 1, 16)
        self._attempt = self._bus.clock.later(self._bus.chance.uniform(ceiling / 2, ceiling), self._connect)

    def lose(self, *, back: bool = True) -> None:
        """Lose the connection without a word.

        Args:
            back: whether the client tries again by itself.
        """
        if self._attempt is not None:
            self._attempt.cancel()
            self._attempt = None
        if self.connected:
            self._leave()
            session = self.session
            self._will = self._bus.clock.later(WILL_SECONDS, lambda: self._send_will(session))
            self._on_disconnected("connection lost")
        if back:
            self._again()

    def stop(self, timeout: float = 0.0) -> None:
        """Publish the will and leave."""
        if self.connected:
            self._bus.route(self._will_topic, self._will_payload(self.session), 1, retain=True)
            self._leave()
            self._on_disconnected("stopped")

    def _leave(self) -> None:
        self.connected = False
        self._bus.unsubscribe(self)

    def _send_will(self, session: int) -> None:
        self._will = None
        self._bus.route(self._will_topic, self._will_payload(session), 1, retain=True)

    def wait_sent(self, below: int, timeout: float) -> bool:
        """Return whether there is a connection: nothing ever waits for a socket."""
        return self.connected

    def publish(self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False) -> bool:
        """Send a message; return False without a connection.

        Raises:
            MessageError: it is too large.
        """
        if len(payload) > MAX_MESSAGE_BYTES:
            raise MessageError(f"{len(payload)} bytes are over the limit of {MAX_MESSAGE_BYTES}", where=topic)
        if not self.connected:
            return False
        self._bus.messages += 1
        self._bus.bytes += len(payload) + len(topic)
        arrives = self._arrival(qos, self._said_until)
        if arrives is None:
            return True
        if arrives <= self._bus.clock.now:
            self._bus.route(topic, payload, qos, retain=retain)
            return True
        self._said_until = arrives
        session = self.session

        def arrive() -> None:
            # What was on its way when the connection broke is gone.
            if self.connected and self.session == session:
                self._bus.route(topic, payload, qos, retain=retain)

        self._bus.clock.later(arrives - self._bus.clock.now, arrive)
        return True

    def receive(self, topic: str, payload: bytes, qos: int, *, retained: bool) -> None:
        """Take a message from the broker."""
        arrives = self._arrival(qos, self._heard_until)
        if arrives is None:
            return
        self._heard_until = arrives
        session = self.session

        def arrive() -> None:
            if self.connected and self.session == session:
                self._on_message(topic, payload, retained)

        # Never at once, even on a line without latency: whoever sends has to return first.
        self._bus.clock.later(arrives - self._bus.clock.now, arrive)

    def _arrival(self, qos: int, earliest: float) -> float | None:
        """Return when a message arrives, after all before it; None if it is lost."""
        line, chance = self.line, self._bus.chance
        if not qos and line.is_cut():
            return None
        delay = line.latency + (line.jitter * chance.random() if line.jitter else 0.0)
        while line.loss and chance.random() < line.loss:
            if not qos:
                return None
            delay += _RESEND_SECONDS
        return max(self._bus.clock.now + delay, earliest)
