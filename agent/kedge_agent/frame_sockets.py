"""Frames (:mod:`kedge_protocol.frames`) over sockets. NumPy is not loaded here."""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Iterator
from pathlib import Path

from kedge_protocol import frames
from kedge_protocol.errors import InputError

SEND_SECONDS = 1.0
PATIENCE = 5.0
"""Seconds within which a frame must be whole."""


class FrameSender:
    """Sends frames to whoever listens; what is not taken in time is dropped.

    Args:
        path: the socket, which comes and goes with its listener.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._link: socket.socket | None = None

    def wanted(self) -> bool:
        """Return whether somebody listens."""
        return self._path.exists()

    def send(self, raw: bytes | None) -> None:
        """Send a frame; None is none."""
        if raw is None:
            return
        try:
            if self._link is None:
                self._link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                self._link.settimeout(SEND_SECONDS)
                with frames.address(self._path) as address:
                    self._link.connect(address)
            self._link.sendall(raw)
        except OSError:
            # Half a frame may be on its way: the next one begins on a new connection.
            self.close()

    def close(self) -> None:
        """Close the connection."""
        if self._link is not None:
            self._link.close()
            self._link = None


class FrameListener:
    """Listens for frames, from any process on the device.

    Args:
        path: where; a socket that an earlier listener left is replaced.
        most: the bytes of a frame's tensors; a connection that brings more is closed.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, path: Path, *, most: int = frames.MAX_BYTES) -> None:
        self._path = path
        self._most = min(most, frames.MAX_BYTES)
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with frames.address(path) as address:
                self._listening.bind(address)
            # Applications of any user show their calls; nobody reads those of another.
            path.chmod(0o622)
            self._listening.listen(8)
        except BaseException:
            self._listening.close()
            raise
        self._links: list[socket.socket] = []

    def receive(self, seconds: float) -> Iterator[tuple[bytes, bytes]]:
        """Yield the heads and bodies of the frames that come within so many seconds of waiting for the first."""
        ready, _, _ = select.select([self._listening, *self._links], [], [], seconds)
        for link in ready:
            if link is self._listening:
                accepted, _ = self._listening.accept()
                accepted.settimeout(PATIENCE)
                self._links.append(accepted)
            elif link in self._links:
                try:
                    frame = read(link, self._most)
                except (OSError, InputError):
                    self._links.remove(link)
                    link.close()
                else:
                    yield frame

    def drop(self) -> None:
        """Close the connections: what comes over them is no frame."""
        for link in self._links:
            link.close()
        self._links.clear()

    def close(self) -> None:
        """Stop listening."""
        self.drop()
        self._listening.close()
        with contextlib.suppress(OSError):
            self._path.unlink()


def read(link: socket.socket, most: int) -> tuple[bytes, bytes]:
    """Read the head and the body of the next frame.

    Args:
        most: the bytes of a body.

    Raises:
        OSError: the connection ends, or nothing comes in time.
        InputError: it is longer than a frame may be.
    """
    of_head, of_body = frames.LENGTH.unpack(_exactly(link, frames.LENGTH.size))
    if of_head > frames.MAX_HEAD or of_body > most:
        raise InputError(f"a frame of {of_head} and {of_body} bytes is too long", where="frame")
    return _exactly(link, of_head), _exactly(link, of_body)


def _exactly(link: socket.socket, size: int) -> bytes:
    return b"".join(_pieces(link, size))


def _pieces(link: socket.socket, size: int) -> Iterator[bytes]:
    while size:
        piece = link.recv(min(size, 1 << 20))
        if not piece:
            raise ConnectionError("the other end closed the connection")
        size -= len(piece)
        yield piece
