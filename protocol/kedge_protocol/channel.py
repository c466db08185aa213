"""What agent and controller need of a connection to a broker. :class:`kedge_protocol.mqtt.Connection` is the real one;
a simulation has its own."""

from __future__ import annotations

from typing import Protocol

from kedge_protocol.broker import Broker


class Channel(Protocol):
    """A connection to a broker; :class:`kedge_protocol.mqtt.Connection` says what its parts mean."""

    broker: Broker
    session: int

    @property
    def connected(self) -> bool:
        """Whether the connection and all subscriptions are active."""

    def start(self) -> None:
        """Start connecting."""

    def stop(self, timeout: float = 3.0) -> None:
        """Publish the will and disconnect."""

    def publish(self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False) -> bool:
        """Queue one message for sending; return whether it was accepted."""

    def wait_sent(self, below: int, timeout: float) -> bool:
        """Wait until fewer than ``below`` payload bytes of QoS 0 wait for the socket."""
