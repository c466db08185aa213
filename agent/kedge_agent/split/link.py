"""The link between two devices that hold parts of a model: one TCP connection for each group of sequences.

::

    → Hello                                                 ← Reply
    → Step, hidden states float32 [rows, step, channels]    ← Reply, hidden states float32 [rows, keep, channels]

Each is sent as a frame (:mod:`kedge_protocol.frames`): its sizes, a JSON document, and the numbers, little-endian. An
end that cannot do what is asked says why, and closes. What a connection holds ends with it.
"""

from __future__ import annotations

import contextlib
import math
import select
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_agent import frame_sockets
from kedge_agent.split.settings import SplitSettings
from kedge_protocol import addresses, codec, frames
from kedge_protocol.errors import KedgeError, NeighbourError
from kedge_targets.decoder.stages import Stage
from kedge_targets.decoder.windows import Window

Array = npt.NDArray[Any]

_ALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 10_000}
"""A device without power is noticed within about ten seconds, however long a step may take."""


@dataclass(frozen=True, kw_only=True)
class Hello:
    """What the device with the earlier layers asks for: this very bundle, with caches for so many sequences."""

    bundle: str
    slots: int


@dataclass(frozen=True, kw_only=True)
class Copy:
    """The first positions of one slot, which another gets."""

    source: int
    to: int
    positions: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """What is asked of the layers; see :meth:`kedge_targets.decoder.stages.Stage.run`.

    Attributes:
        copies: what is copied before, in this order.
        lengths: one for each row.
        step: positions of each row.
    """

    copies: tuple[Copy, ...]
    first: int
    lengths: tuple[int, ...]
    step: int
    keep: int


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The answer to a :class:`Hello` or a :class:`Step`.

    Attributes:
        error: why it is refused; None if it is not.
        windows: those of all layers from here on, in the answer to a :class:`Hello`.
    """

    error: str | None = None
    windows: tuple[Window, ...] = ()


class RemoteStage(Stage):
    """The layers of the next device, as a stage of this one's decoder.

    Args:
        address: ``host:port``.
        wanted: what is asked for of the other device.
        channels: of the hidden states.
    """

    def __init__(self, settings: SplitSettings, address: str, wanted: Hello, *, channels: int) -> None:
        self._settings = settings
        self._address = address
        self._wanted = wanted
        self._channels = channels
        self._context = settings.client_context()
        self._connection: socket.socket | None = None
        self._copies: list[Copy] = []

    def ready(self) -> bool:
        """See :meth:`kedge_targets.decoder.session.DecoderSession.ready`.

        Raises:
            NeighbourError: the device does not answer, or holds another bundle.
        """
        # Between two steps the other end has nothing to say, unless that it closed.
        if self._connection is not None and not readable(self._connection, 0):
            return True
        self.close()
        with self._failures():
            self._connection = socket.create_connection(addresses.parse(self._address), self._settings.seconds)
            self._connection = prepared(self._connection, self._context, self._settings.seconds)
            self.windows = self._answer(self._wanted)[0].windows
        return False

    def run(self, first: int, values: Array, lengths: Array, keep: int) -> Array:
        """See :meth:`kedge_targets.decoder.stages.Stage.run`.

        Raises:
            NeighbourError: the device was lost, or cannot run the step; its caches are lost too.
        """
        rows, step = values.shape[:2]
        asked = Step(copies=tuple(self._copies), first=first, lengths=tuple(lengths.tolist()), step=step, keep=keep)
        shape = (rows, keep, self._channels)
        with self._failures():
            _, raw = self._answer(asked, np.ascontiguousarray(values, "<f4").tobytes(), size=4 * math.prod(shape))
        self._copies.clear()
        return np.frombuffer(raw, "<f4").reshape(shape)

    def copy(self, source: int, to: int, positions: int) -> None:
        """See :meth:`kedge_targets.decoder.stages.Stage.copy`; it goes with the next step."""
        self._copies.append(Copy(source=source, to=to, positions=positions))

    @property
    def cache_bytes(self) -> int:
        """Return 0: the caches are on the other device."""
        return 0

    def close(self) -> None:
        """See :meth:`kedge_targets.decoder.stages.Stage.close`."""
        self._copies.clear()
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _answer(self, asked: Hello | Step, body: bytes = b"", *, size: int = 0) -> tuple[Reply, bytes]:
        """Return what the other device answers, with so many bytes of numbers."""
        if self._connection is None:
            raise ConnectionError("the connection was lost")
        send(self._connection, asked, body)
        reply, raw = receive(self._connection, Reply, size)
        if reply.error is not None:
            raise self._error(reply.error)
        if len(raw) != size:
            raise ConnectionError(f"it answers with {len(raw)} bytes in place of {size}")
        return reply, raw

    def _error(self, what: str) -> NeighbourError:
        return NeighbourError(
            what,
            where=f"the device with the layers after these, {self._address}",
            remedy="Once it is there again, so is the model",
        )

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Close the link when something fails, and say what."""
        try:
            yield
        except (OSError, KedgeError) as error:
            self.close()
            if isinstance(error, NeighbourError):
                raise
            words = error.what if isinstance(error, KedgeError) else error.strerror or str(error)
            late = f"no answer within {self._settings.seconds:g} s"
            raise self._error(late if isinstance(error, TimeoutError) else f"the link is lost: {words}") from error


def prepared(
    plain: socket.socket, context: ssl.SSLContext | None, seconds: float, *, server: bool = False
) -> socket.socket:
    """Set a connection up, with TLS if there is a context: small messages leave at once, and an end that vanishes is
    noticed.

    Raises:
        OSError: the other end speaks no TLS, or has no certificate of the authority.
    """
    plain.settimeout(seconds)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _ALIVE.items():
        plain.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return plain if context is None else context.wrap_socket(plain, server_side=server)


def readable(connection: socket.socket, seconds: float) -> bool:
    """Wait so long until the other end says something or closes; return whether it does."""
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def send(connection: socket.socket, document: Hello | Step | Reply, body: bytes = b"") -> None:
    """Send a document, and numbers after it."""
    head = codec.encode(document)
    connection.sendall(frames.LENGTH.pack(len(head), len(body)) + head + body)


def receive(connection: socket.socket, kind: type[Any], most: int = 0) -> tuple[Any, bytes]:
    """Receive a document of this kind, and numbers of so many bytes at most after it.

    Raises:
        OSError: the other end closed or vanished.
        KedgeError: it is too long, or not of this kind.
    """
    head, body = frame_sockets.read(connection, most)
    return codec.decode(head, kind, where="link"), body
