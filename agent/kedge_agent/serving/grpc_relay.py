"""Passes gRPC connections on from a socket that the agent owns: grpcio cannot listen on one itself.

While the serving process is started anew, connections wait in the kernel's queue, as HTTP's do, instead of being
refused. Bytes are passed on as they are, so that TLS ends in grpcio.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import selectors
import socket
import threading

log = logging.getLogger("kedge.serving")

_PIECE = 1 << 16
_MOST_WAITING = 1 << 20
"""Bytes that may wait for a slow side; beyond it the other side is not read."""


def inner_address() -> str:
    """Return a new address in Linux's abstract name space; it vanishes with the process."""
    return f"kedge-grpc-{os.getpid()}-{secrets.token_hex(8)}"


class _Side:
    """One end of a passed connection.

    Attributes:
        waiting: bytes that are still to be sent to this end.
        ended: whether this end sends no more.
    """

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        self.waiting = bytearray()
        self.ended = False
        self.shut = False
        self.other: _Side = self

    def events(self) -> int:
        reads = not self.ended and len(self.other.waiting) < _MOST_WAITING
        return (selectors.EVENT_READ if reads else 0) | (selectors.EVENT_WRITE if self.waiting else 0)


class GrpcRelay:
    """Accepts connections in a thread of its own and passes them on.

    Args:
        listening: the agent's listening socket.
        inner: the abstract address on which the gRPC server listens.
    """

    def __init__(self, listening: socket.socket, inner: str) -> None:
        self._listening = listening
        self._inner = inner
        self._selector = selectors.DefaultSelector()
        self._ending, self._end = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="kedge-grpc-relay", daemon=True)

    @property
    def port(self) -> int:
        """Return the port of the outer address."""
        return int(self._listening.getsockname()[1])

    def start(self) -> None:
        """Start accepting connections."""
        self._listening.setblocking(False)
        self._selector.register(self._listening, selectors.EVENT_READ)
        self._selector.register(self._ending, selectors.EVENT_READ)
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """Accept no more connections and close those that are open."""
        self._end.close()
        self._thread.join(seconds)

    def _run(self) -> None:
        while True:
            for key, mask in self._selector.select():
                if key.fileobj is self._ending:
                    return
                if key.fileobj is self._listening:
                    self._accept()
                elif isinstance(key.data, _Side):
                    self._pass(key.data, mask)

    def _accept(self) -> None:
        try:
            outer, _ = self._listening.accept()
        except OSError:
            return
        inner = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            inner.connect(f"\0{self._inner}")
            outer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            log.error("a gRPC connection cannot be passed on: %s", error)
            outer.close()
            inner.close()
            return
        one, other = _Side(outer), _Side(inner)
        one.other, other.other = other, one
        for side in (one, other):
            side.end.setblocking(False)
            self._selector.register(side.end, selectors.EVENT_READ, side)

    def _pass(self, side: _Side, mask: int) -> None:
        try:
            if mask & selectors.EVENT_READ:
                self._read(side)
            if mask & selectors.EVENT_WRITE:
                self._write(side)
        except OSError:
            self._close(side)
            return
        if side.ended and side.other.ended and not side.waiting and not side.other.waiting:
            self._close(side)
            return
        for one in (side, side.other):
            self._watch(one)

    def _read(self, side: _Side) -> None:
        try:
            piece = side.end.recv(_PIECE)
        except BlockingIOError:
            return
        if not piece:
            side.ended = True
        side.other.waiting += piece
        self._write(side.other)

    def _write(self, side: _Side) -> None:
        while side.waiting:
            try:
                sent = side.end.send(side.waiting)
            except BlockingIOError:
                return
            del side.waiting[:sent]
        if side.other.ended and not side.shut:
            side.shut = True
            with contextlib.suppress(OSError):
                side.end.shutdown(socket.SHUT_WR)

    def _watch(self, side: _Side) -> None:
        events = side.events()
        known = self._selector.get_map().get(side.end.fileno())
        if known is None:
            if events:
                self._selector.register(side.end, events, side)
        elif not events:
            self._selector.unregister(side.end)
        elif known.events != events:
            self._selector.modify(side.end, events, side)

    def _close(self, side: _Side) -> None:
        for one in (side, side.other):
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(one.end)
            one.end.close()
