"""The embedded broker's listener: refuses connections on which amqtt would hang or fail silently.

amqtt reads a CONNECT of MQTT 5 as one of 3.1.1 and then waits for bytes that never come; and it takes packets of any
length. So connections are accepted here, looked at, and handed on.
"""

from __future__ import annotations

import asyncio
import logging

from amqtt.adapters import StreamReaderAdapter, StreamWriterAdapter
from amqtt.broker import Broker

from kedge_protocol.blocks import MAX_MESSAGE_BYTES

log = logging.getLogger(__name__)

MAX_PACKET_BYTES = MAX_MESSAGE_BYTES + 4096
"""Largest size of a message with its topic; the connection of a client that sends more is closed."""
FIRST_PACKET_SECONDS = 10.0

_LEVEL_3_1_1 = 4
_UNACCEPTABLE_PROTOCOL = b"\x20\x02\x00\x01"
"""CONNACK with return code 1 (MQTT 3.1.1, section 3.2.2.3)."""
_LISTENER = "default"


class BoundedReader:
    """A client's bytes as amqtt reads them: first those already inspected. A read of too many bytes ends the stream.

    amqtt reads a message's payload with one call, so the wish is the message's length.
    """

    def __init__(self, reader: asyncio.StreamReader, seen: bytes) -> None:
        self._inner = StreamReaderAdapter(reader)
        self._seen = seen
        self._ended = False

    async def read(self, n: int = -1) -> bytes:
        """Read ``n`` bytes; empty if the connection ends."""
        if self._ended or n > MAX_PACKET_BYTES:
            self._ended = True
            return b""
        if self._seen and n >= 0:
            taken, self._seen = self._seen[:n], self._seen[n:]
            if len(taken) < n:
                taken += await self._inner.read(n - len(taken))
            return taken
        return bytes(await self._inner.read(n))

    def feed_eof(self) -> None:
        """Note that the broker stops reading."""
        self._inner.feed_eof()


async def open_listener(broker: Broker, host: str, port: int) -> asyncio.Server:
    """Accept connections for a started broker with an external listener."""

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            seen = await asyncio.wait_for(_beginning(reader), FIRST_PACKET_SECONDS)
            if seen is not None:
                await broker.external_connected(BoundedReader(reader, seen), StreamWriterAdapter(writer), _LISTENER)
            else:
                writer.write(_UNACCEPTABLE_PROTOCOL)
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError):
            pass  # the client went, or said nothing
        except Exception:  # a fault of the broker costs one client its connection, and the client is told by its end
            log.exception("the embedded broker lost a client")
        finally:
            writer.close()

    return await asyncio.start_server(accept, host, port, limit=2 * MAX_PACKET_BYTES)


async def _beginning(reader: asyncio.StreamReader) -> bytes | None:
    """Read the first bytes of a CONNECT up to the protocol level; None if it is not 3.1.1."""
    seen = await reader.readexactly(2)
    while seen[-1] & 0x80 and len(seen) < 5:
        seen += await reader.readexactly(1)
    seen += await reader.readexactly(7)  # the length and name of the protocol (6 bytes), its level (1)
    return seen if seen[-1] == _LEVEL_3_1_1 else None
