"""Where the answers of :mod:`kedge_agent.watching.watch` go: lines of JSON, or MQTT."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable
from typing import Any, Protocol

from kedge_protocol.broker import Broker
from kedge_protocol.errors import ConfigError, MessageError
from kedge_protocol.mqtt import Connection

log = logging.getLogger("kedge.watch")

_CONNECT_SECONDS = 10.0
_SEND_SECONDS = 5.0


class Output(Protocol):
    """Takes one record for each frame."""

    def write(self, record: dict[str, Any]) -> None:
        """Write a record."""
        ...

    def close(self) -> None:
        """Send what is left, and end."""
        ...


class JsonLines:
    """One line of JSON for each record.

    Args:
        write_line: called with each line, which ends with a line feed.
    """

    def __init__(self, write_line: Callable[[str], object]) -> None:
        self._write_line = write_line

    def write(self, record: dict[str, Any]) -> None:
        """See :class:`Output`."""
        self._write_line(json.dumps(record, ensure_ascii=False) + "\n")

    def close(self) -> None:
        """See :class:`Output`."""


class Mqtt:
    """One message of JSON for each record, QoS 0; ``TOPIC/status`` (retained, will) says whether the watch runs.

    Args:
        broker: the broker.
        topic: without wildcards.

    Raises:
        ConfigError: the topic is invalid, or the broker cannot be reached.
    """

    def __init__(self, broker: Broker, topic: str) -> None:
        if not topic or any(sign in topic for sign in "+#\0") or topic.startswith("$"):
            raise ConfigError(f"{topic!r} is no topic to publish to", remedy="Use one without +, # and $")
        self._topic = topic
        self.lost = 0
        """Records that were not sent because there was no connection."""
        self._link = Connection(
            broker,
            f"kedge-watch-{secrets.token_hex(4)}",
            will_topic=f"{topic}/status",
            will_payload=b'{"online":false}',
            subscriptions=[],
            on_connected=lambda _: self._say_online(),
            on_disconnected=lambda reason: log.warning("the broker is away: %s", reason),
            on_message=lambda *_: None,
        )
        self._link.start()
        if not self._link.wait_connected(_CONNECT_SECONDS):
            reason = self._link.problem or f"no answer within {_CONNECT_SECONDS:g} s"
            self._link.stop()
            raise ConfigError(f"cannot be reached: {reason}", where=broker.url)

    def _say_online(self) -> None:
        self._link.publish(f"{self._topic}/status", b'{"online":true}', qos=1, retain=True)

    def write(self, record: dict[str, Any]) -> None:
        """See :class:`Output`. Without a connection the record is lost and counted: frames are not kept for later."""
        payload = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()
        try:
            sent = self._link.publish(self._topic, payload)
        except MessageError as error:
            log.error("%s", error)
            sent = False
        self.lost += not sent

    def close(self) -> None:
        """See :class:`Output`."""
        self._link.wait_sent(1, _SEND_SECONDS)
        self._link.stop()
