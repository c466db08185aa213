"""amqtt's broker, patched for two faults that cost a fleet its connections (amqtt 0.12, decision 017).

- It walks its subscriptions while it waits for clients. A subscription that arrives meanwhile ends the walk with a
  ``RuntimeError``, and with it the newcomer's connection.
- To each client that connects it sends every retained message that *anybody* has subscribed to.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from amqtt.broker import Broker
from amqtt.session import Session

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class SnapshotDict(dict[_Key, _Value]):
    """A dictionary that may change during iteration: each iteration sees the items present at its start."""

    def __iter__(self) -> Iterator[_Key]:
        return iter(tuple(super().keys()))

    def items(self) -> Any:
        """Return a snapshot of the items."""
        return dict(super().items()).items()


class MendedBroker(Broker):  # type: ignore[misc]
    """A broker that many clients can join at the same time."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._subscriptions: SnapshotDict[str, list[tuple[Session, int]]] = SnapshotDict(self._subscriptions)

    async def _publish_retained_messages_for_subscription(
        self, subscription: tuple[str, int], session: Session
    ) -> None:
        """Send the retained messages of one subscription, if it is this client's own.

        amqtt calls this for a new subscription, after it was added, and for all subscriptions of all clients whenever
        a client connects (MQTT 3.1.1, section 3.3.1.3, asks for neither more nor less than the first).
        """
        if any(one.client_id == session.client_id for one, _ in self._subscriptions.get(subscription[0], ())):
            await super()._publish_retained_messages_for_subscription(subscription, session)
