"""Many clients of a real broker on one thread: a selector loop over paho clients, with timers."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import random
import selectors
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion

from kedge.simulator.bus import Line
from kedge.simulator.clock import Timer
from kedge_protocol.blocks import MAX_MESSAGE_BYTES
from kedge_protocol.broker import Broker
from kedge_protocol.errors import MessageError
from kedge_protocol.mqtt import KEEPALIVE, Backoff

_MISC_SECONDS = 5.0
_READ = selectors.EVENT_READ
_AT_ONCE = 200
"""Timers that are served before the sockets get their turn."""


class Attached(Protocol):
    """What a client's socket is served for."""

    def ended(self, client: paho.Client) -> None:
        """Learn that the client lost its connection."""


class Loop:
    """The thread of all clients. Everything that they do happens on it; other threads call :meth:`later`."""

    def __init__(self) -> None:
        self.problem: BaseException | None = None
        self.messages = 0
        self.bytes = 0
        self._of: dict[paho.Client, Attached] = {}
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._lock = threading.Lock()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="simulated devices", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self.later(_MISC_SECONDS, self._keep_alive)
        self._thread.start()

    def stop(self) -> None:
        """End the thread and leave the broker without a word, as devices that lose their power."""
        self._stopping = True
        self._thread.join(30.0)

    def later(self, seconds: float, function: Callable[[], None]) -> Timer:
        """Call a function on the thread after so many seconds."""
        timer = Timer(function)
        with self._lock:
            heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._order), timer))
        return timer

    def attach(self, connection: Attached, client: paho.Client) -> None:
        """Serve a client's socket."""
        self._of[client] = connection
        read, both = _READ, _READ | selectors.EVENT_WRITE
        client.on_socket_open = lambda _, __, sock: self._add(sock, client)
        client.on_socket_close = lambda _, __, sock: self._forget(sock)
        client.on_socket_register_write = lambda _, __, sock: self._modify(sock, both, client)
        client.on_socket_unregister_write = lambda _, __, sock: self._modify(sock, read, client)

    def detach(self, client: paho.Client) -> None:
        """Serve a client no more."""
        self._of.pop(client, None)

    def close(self, sock: Any) -> None:
        """Close a client's socket."""
        self._forget(sock)
        sock.close()

    def _add(self, sock: Any, client: paho.Client) -> None:
        self._selector.register(sock, _READ, client)

    def _forget(self, sock: Any) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(sock)

    def _modify(self, sock: Any, wanted: int, client: paho.Client) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.modify(sock, wanted, client)

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._turn()
            for client in list(self._of):
                if (sock := client.socket()) is not None:
                    sock.close()
        except BaseException as error:
            self.problem = error
            raise

    def _turn(self) -> None:
        due: list[Timer] = []
        with self._lock:
            now = time.monotonic()
            while self._timers and self._timers[0][0] <= now and len(due) < _AT_ONCE:
                due.append(heapq.heappop(self._timers)[2])
        for timer in due:
            if timer.function is not None:
                timer.function()
        for key, events in self._selector.select(0.0 if due else 0.01):
            self._serve(key.data, events)

    def _serve(self, client: paho.Client, events: int) -> None:
        code = MQTTErrorCode.MQTT_ERR_SUCCESS
        if events & selectors.EVENT_READ:
            code = client.loop_read()
        if code == MQTTErrorCode.MQTT_ERR_SUCCESS and events & selectors.EVENT_WRITE and client.socket() is not None:
            code = client.loop_write()
        if code != MQTTErrorCode.MQTT_ERR_SUCCESS or client.socket() is None:
            self._ended(client)

    def _keep_alive(self) -> None:
        for client in list(self._of):
            if client.loop_misc() != MQTTErrorCode.MQTT_ERR_SUCCESS:
                self._ended(client)
        self.later(_MISC_SECONDS, self._keep_alive)

    def _ended(self, client: paho.Client) -> None:
        connection = self._of.pop(client, None)
        if connection is not None:
            connection.ended(client)


class LoopConnection:
    """One client's connection; see :class:`kedge_protocol.mqtt.Connection` for what the arguments mean.

    Args:
        loop: the thread.
        line: the client's network, worse than the real one is.
        chance: draws what the network does.
    """

    def __init__(
        self,
        loop: Loop,
        line: Line,
        chance: random.Random,
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
        self._loop = loop
        self._line = line
        self._chance = chance
        self._will = (will_topic, will_payload)
        self._subscriptions = [(item, 1) if isinstance(item, str) else item for item in subscriptions]
        self._on_connected = on_connected
        self._on_disconnected = on_disconnected
        self._on_message = on_message
        self._backoff = Backoff(source=chance)
        self._client: paho.Client | None = None
        self._gone = False
        self._heard_until = self._said_until = 0.0

    def start(self) -> None:
        """Connect, now and again after each loss."""
        self._loop.later(0.0, self._connect)

    def _connect(self) -> None:
        if self._gone:
            return
        if self._line.is_cut():
            self._loop.later(self._backoff.next(), self._connect)
            return
        self.session += 1
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=self.client_id,
            protocol=MQTTProtocolVersion.MQTTv311,
            reconnect_on_failure=False,
        )
        client.will_set(self._will[0], self._will[1](self.session), qos=1, retain=True)
        if self.broker.username is not None:
            client.username_pw_set(self.broker.username, self.broker.password)
        if (context := self.broker.tls_context()) is not None:
            client.tls_set_context(context)
        client.on_connect = self._accepted
        client.on_subscribe = self._subscribed
        client.on_message = self._came
        self._loop.attach(self, client)
        self._client = client
        try:
            client.connect(self.broker.host, self.broker.port, keepalive=KEEPALIVE)
        except OSError:
            self._loop.detach(client)
            self.ended(client)

    def _accepted(self, client: paho.Client, _: object, __: object, reason: Any, ___: object) -> None:
        if not reason.is_failure:
            client.subscribe(self._subscriptions)

    def _subscribed(self, *_: object) -> None:
        self.connected = True
        self._backoff.reset()
        self._on_connected(self.session)

    def _came(self, _: paho.Client, __: object, message: paho.MQTTMessage) -> None:
        topic, payload, retained = message.topic, bytes(message.payload), bool(message.retain)

        def hear() -> None:
            self._on_message(topic, payload, retained)

        self._heard_until = self._pass(message.qos, self._heard_until, hear)

    def ended(self, client: paho.Client) -> None:
        """Note that a client's connection has ended, and try again."""
        if client is not self._client:
            return
        self._client = None
        if self.connected:
            self.connected = False
            self._on_disconnected("connection lost")
        if not self._gone:
            self._loop.later(self._backoff.next(), self._connect)

    def lose(self, *, back: bool = True) -> None:
        """Lose the connection without a word.

        Args:
            back: whether the client tries again by itself.
        """
        self._gone = not back
        client = self._client
        if client is not None:
            self._loop.detach(client)
            if (sock := client.socket()) is not None:
                self._loop.close(sock)
            self.ended(client)

    def stop(self, timeout: float = 0.0) -> None:
        """Leave for good."""
        self.lose(back=False)

    def wait_sent(self, below: int, timeout: float) -> bool:
        """Return whether there is a connection."""
        return self.connected

    def publish(self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False) -> bool:
        """Send a message; return False without a connection.

        Raises:
            MessageError: it is too large.
        """
        if len(payload) > MAX_MESSAGE_BYTES:
            raise MessageError(f"{len(payload)} bytes are over the limit of {MAX_MESSAGE_BYTES}", where=topic)
        client = self._client
        if client is None or not self.connected:
            return False

        def send() -> None:
            client.publish(topic, payload, qos=qos, retain=retain)

        self._loop.messages += 1
        self._loop.bytes += len(payload) + len(topic)
        self._said_until = self._pass(qos, self._said_until, send)
        return True

    def _pass(self, qos: int, earliest: float, function: Callable[[], None]) -> float:
        """Let a message through as the line allows; return when the next one may pass at the earliest."""
        line, now = self._line, time.monotonic()
        if line.loss and not qos and self._chance.random() < line.loss:
            return earliest
        delay = line.latency + (line.jitter * self._chance.random() if line.jitter else 0.0)
        arrives = max(now + delay, earliest)
        session = self.session

        def arrive() -> None:
            if self.connected and self.session == session:
                function()

        if arrives <= now:
            arrive()
        else:
            self._loop.later(arrives - now, arrive)
        return arrives
