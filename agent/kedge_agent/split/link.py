"""The link between two devices that hold parts of a model: one TCP connection for each group of sequences.

::

    → [4] size, JSON Hello                 ← [4] size, JSON Welcome
    → step header, [rows] int64 lengths, hidden states float32 [rows, step, channels]
                                           ← [1] status, [4] size, then hidden states float32 [rows, keep, channels],
                                             or a text that says what went wrong, after which it closes
    → header of a copy (first slot: source, rows: to, step: positions); nothing comes back

Numbers are little-endian. What a connection holds ends with it.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_agent.split.settings import SplitSettings
from kedge_protocol import addresses, codec
from kedge_protocol.errors import MessageError, NeighbourError
from kedge_targets.decoder.stages import Stage

Array = npt.NDArray[Any]

RUN, COPY = 1, 2
STEP = struct.Struct("<BxxxIIII")
"""Kind, first slot, rows, positions of the step, last positions that are wanted."""
REPLY = struct.Struct("<BI")
DONE, FAILED = 0, 1
_SIZE = struct.Struct("<I")
_DOCUMENT = 1 << 16
_ALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 10_000}
"""A device without power is noticed within about ten seconds, however long a step may take."""


@dataclass(frozen=True, kw_only=True)
class Hello:
    """What the device with the earlier layers asks for: this very bundle, with caches for so many sequences."""

    bundle: str
    slots: int
    context: int


@dataclass(frozen=True, kw_only=True)
class Welcome:
    """The answer; ``error`` says why not."""

    error: str | None = None


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
        self._context = settings.context(server=False)
        self._connection: socket.socket | None = None

    def ready(self) -> bool:
        """See :meth:`kedge_targets.decoder.session.DecoderSession.ready`.

        Raises:
            NeighbourError: the device does not answer, or holds another bundle.
        """
        if self._connection is not None and _is_open(self._connection):
            return True
        self.close()
        with self._failures():
            host, port = addresses.parse(self._address)
            plain = socket.create_connection((host, port), self._settings.seconds)
            self._connection = prepared(plain, self._settings.seconds)
            if self._context is not None:
                self._connection = self._context.wrap_socket(self._connection)
            send_document(self._connection, self._wanted)
            welcome = receive_document(self._connection, Welcome)
        if welcome.error is not None:
            self.close()
            raise self._error(welcome.error)
        return False

    def run(self, first: int, values: Array, lengths: Array, keep: int) -> Array:
        """See :meth:`kedge_targets.decoder.stages.Stage.run`.

        Raises:
            NeighbourError: the device was lost, or cannot run the step; its caches are lost too.
        """
        rows, step = values.shape[:2]
        with self._failures():
            connection = self._there()
            connection.sendall(
                b"".join(
                    (
                        STEP.pack(RUN, first, rows, step, keep),
                        np.ascontiguousarray(lengths, "<i8").tobytes(),
                        np.ascontiguousarray(values, "<f4").tobytes(),
                    )
                )
            )
            status, size = REPLY.unpack(receive(connection, REPLY.size))
            if size > max(_DOCUMENT, rows * keep * self._channels * 4):
                raise ConnectionError(f"an answer of {size} bytes is too long")
            raw = receive(connection, size)
        if status != DONE or size != rows * keep * self._channels * 4:
            self.close()
            raise self._error(raw[:_DOCUMENT].decode(errors="replace") if status != DONE else "it gave another size")
        return np.frombuffer(raw, "<f4").reshape(rows, keep, self._channels)

    def copy(self, source: int, to: int, positions: int) -> None:
        """See :meth:`kedge_targets.decoder.stages.Stage.copy`."""
        with self._failures():
            self._there().sendall(STEP.pack(COPY, source, to, positions, 0))

    @property
    def cache_bytes(self) -> int:
        """Return 0: the caches are on the other device."""
        return 0

    def close(self) -> None:
        """See :meth:`kedge_targets.decoder.stages.Stage.close`."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _there(self) -> socket.socket:
        if self._connection is None:
            raise ConnectionError("the connection was lost")
        return self._connection

    def _error(self, what: str) -> NeighbourError:
        return NeighbourError(
            what,
            where=f"the device with the layers after these, {self._address}",
            remedy="Once it is there again, so is the model",
        )

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except (OSError, MessageError) as error:
            self.close()
            if isinstance(error, TimeoutError):
                raise self._error(f"no answer within {self._settings.seconds:g} s") from error
            words = error.what if isinstance(error, MessageError) else error.strerror or str(error)
            raise self._error(f"the link is lost: {words}") from error


def prepared(connection: socket.socket, seconds: float | None) -> socket.socket:
    """Set a connection up: small messages leave at once, and an end that vanishes is noticed."""
    connection.settimeout(seconds)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _ALIVE.items():
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection


def receive(connection: socket.socket, size: int) -> bytes:
    """Receive so many bytes.

    Raises:
        OSError: the other end closed or vanished.
    """
    found = bytearray(size)
    view = memoryview(found)
    while view:
        count = connection.recv_into(view)
        if not count:
            raise ConnectionError("it closed the connection")
        view = view[count:]
    return bytes(found)


def send_document(connection: socket.socket, document: Hello | Welcome) -> None:
    """Send a small JSON document."""
    raw = codec.encode(document)
    connection.sendall(_SIZE.pack(len(raw)) + raw)


def receive_document(connection: socket.socket, kind: type[Any]) -> Any:
    """Receive a small JSON document.

    Raises:
        OSError: see :func:`receive`.
        MessageError: it is too long, or not of this kind.
    """
    (size,) = _SIZE.unpack(receive(connection, _SIZE.size))
    if size > _DOCUMENT:
        raise MessageError(f"a document of {size} bytes is too long")
    return codec.decode(receive(connection, size), kind, where="link")


def _is_open(connection: socket.socket) -> bool:
    """Return whether the other end has not closed; between two steps it has nothing to say."""
    seconds = connection.gettimeout()
    try:
        connection.setblocking(False)
        connection.recv(1)
    except (BlockingIOError, ssl.SSLWantReadError):
        return True
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            connection.settimeout(seconds)
    return False
