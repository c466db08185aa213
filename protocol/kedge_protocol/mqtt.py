"""The connection to a broker, shared by agent and controller: MQTT 5 with a fallback to 3.1.1, reconnection with
jittered back-off, the will, and a size limit on every message.

Nothing is carried over from one connection to the next: paho would resend unacknowledged messages after newer state was
published, and beyond its own in-flight limit. State is published again in ``on_connected`` instead.
"""

from __future__ import annotations

import logging
import random
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from kedge_protocol import tls
from kedge_protocol.blocks import MAX_MESSAGE_BYTES
from kedge_protocol.broker import Broker, parse_broker
from kedge_protocol.errors import BrokerError, ConfigError, MessageError

__all__ = ["Backoff", "Broker", "Connection", "parse_broker"]

log = logging.getLogger(__name__)

KEEPALIVE = 20
"""The keepalive in seconds; a broker sends the will after about one and a half of these without a sign of life."""
CONNECT_TIMEOUT = 8.0
"""The time limit for TCP and TLS, in seconds."""
ANSWER_TIMEOUT = 5.0
"""The time limit for the broker's answer to a connection, and again for its answers to the subscriptions, in
seconds."""
MAX_INFLIGHT = 16
"""The maximum number of QoS 1 messages sent but not acknowledged."""
MAX_QUEUED = 512
"""The maximum number of QoS 1 messages waiting; :meth:`Connection.publish` refuses more."""
MAX_UNSENT_BYTES = 8 * 1024 * 1024
"""The maximum number of QoS 0 payload bytes waiting for the socket; :meth:`Connection.publish` refuses more."""
STABLE_SECONDS = 5.0
"""A connection that lasted this many seconds resets the back-off."""

_EARLY_MESSAGES = 10_000
_OVERHEAD = 512
"""The bytes of a packet in addition to its payload: header, topic, properties."""


class Backoff:
    """Waiting times between attempts: doubled each time up to ``cap``, and drawn at random from the upper half, so that
    a fleet does not reconnect in step.

    Args:
        base, cap: the first and the longest waiting time, in seconds.
    """

    def __init__(self, base: float = 0.5, cap: float = 30.0, *, source: random.Random | None = None) -> None:
        self.base = base
        self.cap = cap
        self._source = source or random.Random()
        self._failures = 0

    def next(self) -> float:
        """Return the seconds to wait before the next attempt."""
        ceiling = min(self.cap, self.base * 2.0 ** min(self._failures, 32))
        self._failures += 1
        return self._source.uniform(ceiling / 2, ceiling)

    def reset(self) -> None:
        """Start again from ``base`` after a success."""
        self._failures = 0


def _no_delay(opened: object) -> None:
    if isinstance(opened, socket.socket):
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class _RefusedError(Exception):
    """The broker refused the connection."""


class _WrongProtocolError(Exception):
    """The broker does not speak this version of MQTT, or closed without an answer."""


def _tried_both(broker: Broker) -> str:
    """Return what may be wrong if neither version of MQTT is answered."""
    hint = (
        "is it an MQTT broker?" if broker.tls else "does it want TLS on this port (mqtts://), or is it no MQTT broker?"
    )
    return f"MQTT 5 and 3.1.1; {hint}"


class Connection:
    """One client's connection to the broker, maintained until :meth:`stop`.

    MQTT 5 is tried first, and 3.1.1 if the broker refuses it or closes without an answer. Sessions are always clean.
    Callbacks run one at a time on the thread of this class, and may publish; an exception in one is logged and does
    not end the connection.

    Args:
        client_id: unique at the broker.
        will_topic, will_payload: published by the broker (retained, QoS 1) when this client is lost, and by
            :meth:`stop`. A function is called for each connection with its session's number.
        subscriptions: topic filters, or pairs of a filter and its QoS; 1 by default. (Give 0 for bulk data: some
            brokers send everything with the subscriber's QoS.)
        on_connected: called with the session's number, which grows with each attempt, once all subscriptions are
            active. State is published here.
        on_disconnected: called once for each call of ``on_connected``, with the reason in words.
        on_message: called with topic, payload, and whether it was retained; only between the other two.
        keepalive: the keepalive in seconds.
    """

    def __init__(
        self,
        broker: Broker,
        client_id: str,
        *,
        will_topic: str,
        will_payload: bytes | Callable[[int], bytes],
        subscriptions: Sequence[str | tuple[str, int]],
        on_connected: Callable[[int], None],
        on_disconnected: Callable[[str], None],
        on_message: Callable[[str, bytes, bool], None],
        backoff: Backoff | None = None,
        keepalive: int = KEEPALIVE,
    ) -> None:
        self.broker = broker
        self.client_id = client_id
        self.session = 0
        self.problem: str | None = None
        """Why there is no connection; None while there is one or before the first attempt."""
        self._will_topic = will_topic
        self._will_payload = will_payload
        self._subscriptions = [(item, 1) if isinstance(item, str) else item for item in subscriptions]
        self._on_connected = on_connected
        self._on_disconnected = on_disconnected
        self._on_message = on_message
        self._backoff = backoff or Backoff()
        self._keepalive = keepalive
        self._protocol = MQTTProtocolVersion.MQTTv5
        self._client: paho.Client | None = None
        self._pending: set[int] = set()
        self._failure: Exception | None = None
        self._most: int | None = None
        self._answered = False
        self._early: deque[tuple[str, bytes, bool]] = deque(maxlen=_EARLY_MESSAGES)
        self._unsent: deque[tuple[paho.MQTTMessageInfo, int]] = deque()
        self._unsent_bytes = 0
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"mqtt-{client_id}", daemon=True)

    # What callers use, from any thread.

    @property
    def connected(self) -> bool:
        """Whether the connection and all subscriptions are active."""
        return self._ready.is_set()

    @property
    def protocol(self) -> str:
        """The version of MQTT tried last: ``5`` or ``3.1.1``."""
        return "5" if self._protocol is MQTTProtocolVersion.MQTTv5 else "3.1.1"

    def start(self) -> None:
        """Start connecting and return immediately; the broker need not be available yet."""
        self._thread.start()

    def wait_connected(self, timeout: float) -> bool:
        """Wait up to ``timeout`` seconds until :attr:`connected`."""
        return self._ready.wait(timeout)

    def set_will(self, payload: bytes | Callable[[int], bytes]) -> None:
        """Set another will, used from the next connection on (and for :meth:`stop`)."""
        self._will_payload = payload

    def publish(self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False) -> bool:
        """Queue one message for sending.

        Returns:
            Whether it was accepted: False without a connection or with full queues. True does not guarantee that it
            arrives; only an answer from the other side does.

        Raises:
            MessageError: the payload is over 96 KiB, or over this broker's limit. (Brokers drop such a message and
                acknowledge it, or drop the client.)
        """
        if len(payload) > MAX_MESSAGE_BYTES:
            raise MessageError(f"{len(payload)} bytes are over the limit of {MAX_MESSAGE_BYTES}", where=topic)
        if self._most is not None and len(payload) + len(topic) + _OVERHEAD > self._most:
            raise MessageError(
                f"{len(payload)} bytes are more than the broker takes ({self._most})",
                where=topic,
                remedy="Raise its limit (mosquitto: max_packet_size)",
            )
        client = self._client
        if client is None or not self._ready.is_set():
            return False
        if qos:
            return client.publish(topic, payload, qos=qos, retain=retain).rc == MQTTErrorCode.MQTT_ERR_SUCCESS
        with self._lock:
            self._forget_sent()
            if self._unsent_bytes + len(payload) > MAX_UNSENT_BYTES:
                return False
            info = client.publish(topic, payload, qos=0, retain=retain)
            if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
                return False
            self._unsent.append((info, len(payload)))
            self._unsent_bytes += len(payload)
        return True

    def wait_sent(self, below: int, timeout: float) -> bool:
        """Wait until fewer than ``below`` payload bytes of QoS 0 wait for the socket, so that a bulk sender keeps to
        the broker's pace.

        Returns:
            False after ``timeout`` seconds, or without a connection.
        """
        deadline = time.monotonic() + timeout
        while self._ready.is_set():
            with self._lock:
                self._forget_sent()
                if self._unsent_bytes < below:
                    return True
                oldest = self._unsent[0][0]
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            # A short wait: messages of a lost connection are never marked as sent.
            try:
                oldest.wait_for_publish(min(left, 0.2))
            except (RuntimeError, ValueError):
                return False
        return False

    def stop(self, timeout: float = 3.0) -> None:
        """Publish the will (a clean disconnect makes the broker discard it), disconnect, and end the thread."""
        if self._ready.is_set():
            self.publish(self._will_topic, self._will(), qos=1, retain=True)
        self._stopping.set()
        client = self._client
        if client is not None:
            client.disconnect()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    # The thread.

    def _run(self) -> None:
        while not self._stopping.is_set():
            tried = self._protocol
            try:
                self._one_connection()
            except _WrongProtocolError as error:
                # Whoever sees that the turn is at MQTT 5 again reads the trouble of both versions.
                if tried is MQTTProtocolVersion.MQTTv5:
                    self._protocol = MQTTProtocolVersion.MQTTv311
                    self.problem = str(error)
                    log.info("%s: %s with MQTT 5, trying 3.1.1", self.broker.url, error)
                    continue
                self.problem = f"{error} with {_tried_both(self.broker)}"
                self._protocol = MQTTProtocolVersion.MQTTv5
            except (BrokerError, ConfigError, _RefusedError) as error:
                self.problem = str(error)
            except OSError as error:
                self.problem = tls.explained(error, self.broker)
            except Exception as error:
                # paho raises on packets that it cannot read; the thread must outlive them.
                log.exception("the connection to %s failed", self.broker.url)
                self.problem = str(error)
            if not self._stopping.is_set():
                delay = self._backoff.next()
                log.warning("no connection to %s: %s; again in %.1f s", self.broker.url, self.problem, delay)
                self._stopping.wait(delay)

    def _one_connection(self) -> None:
        """Connect and wait until the connection ends, which always raises an exception unless stopped."""
        self.session += 1
        client = self._new_client()
        self._failure, self._answered = None, False
        self._early.clear()
        with self._lock:
            self._unsent.clear()
            self._unsent_bytes = 0
        self._client = client
        since = time.monotonic()
        try:
            client.connect(self.broker.host, self.broker.port, keepalive=self._keepalive)
            since = time.monotonic()
            self._loop(client, since)
        finally:
            was_ready = self._ready.is_set()
            self._ready.clear()
            self._client = None
            if was_ready:
                if time.monotonic() - since >= STABLE_SECONDS:
                    self._backoff.reset()
                self._guarded(self._on_disconnected, "stopped" if self._stopping.is_set() else "connection lost")

    def _loop(self, client: paho.Client, since: float) -> None:
        while True:
            code = client.loop(timeout=0.5)
            if self._failure is not None:
                client.disconnect()
                client.loop(timeout=0.1)
                raise self._failure
            ended = code != MQTTErrorCode.MQTT_ERR_SUCCESS or not client.socket()
            if self._stopping.is_set() and (ended or not self._ready.is_set()):
                return
            if ended and not self._answered:
                if trouble := tls.alert_of(self.broker):
                    raise BrokerError(trouble)
                raise _WrongProtocolError("the broker closed the connection without an answer")
            if ended:
                raise BrokerError(f"the connection was lost ({paho.error_string(code)})", where=self.broker.url)
            waited = time.monotonic() - since
            if not self._answered and waited > ANSWER_TIMEOUT:
                # Some brokers wait for more, having read MQTT 5 as 3.1.1.
                raise _WrongProtocolError("the broker does not answer")
            if not self._ready.is_set() and waited > 2 * ANSWER_TIMEOUT:
                raise BrokerError("the broker does not answer to subscriptions", where=self.broker.url)

    def _new_client(self) -> paho.Client:
        v5 = self._protocol is MQTTProtocolVersion.MQTTv5
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=self.client_id,
            protocol=self._protocol,
            clean_session=None if v5 else True,
            reconnect_on_failure=False,
        )
        client.connect_timeout = CONNECT_TIMEOUT
        client.max_inflight_messages_set(MAX_INFLIGHT)
        client.max_queued_messages_set(MAX_QUEUED)
        client.will_set(self._will_topic, self._will(), qos=1, retain=True)
        if self.broker.username is not None:
            client.username_pw_set(self.broker.username, self.broker.password)
        context = self.broker.tls_context()
        if context is not None:
            client.tls_set_context(context)
        client.on_connect = self._connected
        client.on_subscribe = self._subscribed
        client.on_message = self._received
        # With this set, paho leaves all writing to the loop; else each publishing thread would write to the socket.
        client.on_socket_register_write = lambda *_: None
        # A small message must not wait for the acknowledgement of the one before it (40 ms and more).
        client.on_socket_open = lambda _, __, opened: _no_delay(opened)
        return client

    def _connected(
        self, client: paho.Client, _: object, __: object, reason: ReasonCode, properties: Properties | None
    ) -> None:
        self._answered = True
        if reason.is_failure:
            wrong = reason == ReasonCode(PacketTypes.CONNACK, "Unsupported protocol version")
            kind = _WrongProtocolError if wrong else _RefusedError
            self._failure = kind(f"the broker refuses: {reason}")
            return
        self._most = getattr(properties, "MaximumPacketSize", None)
        if self._most is not None and self._most < MAX_MESSAGE_BYTES + _OVERHEAD:
            log.error(
                "%s takes no packets over %d bytes; Kedge sends up to %d: raise its limit (mosquitto: max_packet_size)",
                self.broker.url,
                self._most,
                MAX_MESSAGE_BYTES + _OVERHEAD,
            )
        self._pending.clear()
        for pattern, qos in self._subscriptions:
            code, mid = client.subscribe(pattern, qos=qos)
            if code == MQTTErrorCode.MQTT_ERR_SUCCESS and mid is not None:
                self._pending.add(mid)
        if not self._pending:
            self._open()

    def _subscribed(
        self, _: paho.Client, __: object, mid: int, reasons: list[ReasonCode], ___: Properties | None
    ) -> None:
        self._pending.discard(mid)
        if any(reason.is_failure for reason in reasons):
            self._failure = _RefusedError(f"the broker refuses a subscription: {reasons[0]}; see its access rules")
        elif not self._pending and not self._ready.is_set():
            self._open()

    def _open(self) -> None:
        self.problem = None
        self._ready.set()
        log.info("connected to %s with MQTT %s", self.broker.url, self.protocol)
        self._guarded(self._on_connected, self.session)
        while self._early:
            self._guarded(self._on_message, *self._early.popleft())

    def _received(self, _: paho.Client, __: object, message: paho.MQTTMessage) -> None:
        if len(message.payload) > MAX_MESSAGE_BYTES:
            log.warning("a message of %d bytes on %s was dropped", len(message.payload), message.topic)
        elif message.retain and not any(paho.topic_matches_sub(item, message.topic) for item, _ in self._subscriptions):
            # amqtt 0.12 sends a new client what is retained for the subscriptions of all others.
            return
        elif self._ready.is_set():
            self._guarded(self._on_message, message.topic, bytes(message.payload), message.retain)
        else:
            self._early.append((message.topic, bytes(message.payload), message.retain))

    def _guarded(self, callback: Callable[..., None], *arguments: object) -> None:
        try:
            callback(*arguments)
        except Exception:
            # The connection is shared by all that its owner does: one bad message must not end it.
            log.exception("a callback of the connection failed")

    def _will(self) -> bytes:
        will = self._will_payload
        return will if isinstance(will, bytes) else will(self.session)

    def _forget_sent(self) -> None:
        while self._unsent:
            info, size = self._unsent[0]
            try:
                if not info.is_published():
                    return
            except (RuntimeError, ValueError):
                pass  # it was lost with its connection
            self._unsent.popleft()
            self._unsent_bytes -= size
