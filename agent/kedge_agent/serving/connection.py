"""One client's connection: reads its requests one after another and sends the answers.

The event loop reads, checks deadlines and closes. A worker sends its answer itself, so that the loop need not be woken
for it; the connection's lock guards what the two share.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kedge_agent.serving.event_loop import FAILED, READ, WRITE
from kedge_agent.serving.handler import error_response, unavailable
from kedge_agent.serving.http_parser import RefusedError
from kedge_agent.serving.request_reader import Received, RequestReader

if TYPE_CHECKING:
    from kedge_agent.serving.exchange import Exchange
    from kedge_agent.serving.http_server import HttpServer

log = logging.getLogger("kedge.serving")

_READ_AHEAD = 64 << 10
"""Bytes of later requests that are read while one is being answered."""
_DRAIN_SECONDS = 2.0
_READS_A_TURN = 4
"""Reads of one connection before the others get their turn."""


class Connection:
    """A client's connection; see the module.

    Args:
        server: the owner.
        link: the client's socket, non-blocking.
        encrypted: whether the socket is an ``ssl.SSLSocket``; then only the loop's thread uses it.
        by_name: whether requests must name this machine, see :meth:`kedge_agent.serving.access.Access.checks_names`.
    """

    def __init__(self, server: HttpServer, link: socket.socket, *, encrypted: bool, by_name: bool) -> None:
        self.lock = threading.Lock()
        self.room = threading.Condition(self.lock)
        """Notified when output has been sent, or the connection is closed."""
        self.closed = False
        self.exchange: Exchange | None = None
        """The request that is being answered; guarded by the lock."""
        self.unsent = 0
        """Bytes in the output queue; guarded by the lock."""
        self.deadline = time.monotonic() + server.settings.idle_seconds
        """Time at which the current step times out (monotonic clock)."""
        self._server = server
        self._link = link
        self._number = link.fileno()
        self._encrypted = encrypted
        self._handshaking = encrypted
        self._output: deque[memoryview] = deque()
        self._mask = READ
        self._reader = RequestReader(server, self._on_head, by_name=by_name)
        self._ended = False
        self._broken = False
        self._refused = False
        self._draining = False
        self._close_after_output = False
        self._is_last = False
        self._taken = 0
        self._input_waits = False

    @property
    def idle(self) -> bool:
        """Return whether no request is in progress."""
        return self.exchange is None and self._reader.head is None and not self.unsent

    def start(self) -> None:
        """Start waiting for the first request."""
        self._server.loop.watch(self._number, READ, self.on_event)

    def on_event(self, mask: int) -> None:
        """Handle a readable, writable or failed socket."""
        if mask & FAILED and not self._encrypted:
            self.close()
            return
        if self._handshaking and not self._shake_hands():
            return
        if mask & WRITE:
            self._flush()
        if mask & READ:
            self._read()

    def on_deadline(self) -> None:
        """Handle the timeout of the current step."""
        exchange = self.exchange
        if exchange is not None and not exchange.begun and not self.unsent:
            exchange.finish(unavailable(f"no answer within {exchange.allowed:g} s"))
        elif exchange is None and not self.unsent and not self._draining and self._reader.begun:
            self._refuse(RefusedError(408, "the request takes too long"))
        else:
            self.close()

    def close(self) -> None:
        """Close the connection; called in the loop's thread."""
        with self.lock:
            if self.closed:
                return
            self.closed = True
            exchange, self.exchange = self.exchange, None
            self._output.clear()
            self.unsent = 0
            self.room.notify_all()
        if exchange is not None:
            exchange.abandon()
        self._reader.drop()
        self._server.loop.forget(self._number)
        self._link.close()
        self._server.ended(self)

    def close_when_answered(self) -> None:
        """Close as soon as the pending request is answered: the one in progress, or one that is partly or wholly
        received. A new connection is given until the loop's next tick to send its first request."""
        if self.exchange is not None or self.unsent:
            self._close_after_output = True
        elif not self._reader.begun and self._taken and not self._has_unread():
            self.close()
        else:
            self._is_last = True
            if not self._reader.begun:
                self.deadline = time.monotonic()

    def _has_unread(self) -> bool:
        """Return whether the system holds received bytes that were not read yet; unknown, so True, under TLS."""
        if self._encrypted:
            return True
        try:
            return bool(self._link.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except OSError:
            return False

    # Sending, in any thread.

    def send(self, pieces: Sequence[bytes | memoryview], exchange: Exchange, *, last: bool) -> bool:
        """Send a part of an answer, or queue it.

        Args:
            last: whether this completes the answer.

        Returns:
            False if the answer is no longer wanted: the client has gone, or got another answer.
        """
        with self.lock:
            if self.exchange is not exchange:
                return False
            if len(pieces) == 1 and not self._output and not self._encrypted:
                # As most answers go: whole.
                taken = self._taken_now(pieces[0])
                pieces = [memoryview(pieces[0])[taken:]] if taken < len(pieces[0]) else ()
            if pieces:
                self._queue(pieces)
                if not self._encrypted:
                    self._write()
            if last:
                self._finished(exchange)
            else:
                self.deadline = time.monotonic() + exchange.allowed
            ends = last and (self._input_waits or self._ended or self._close_after_output)
            wake = bool(self._output) or ends or self._broken
        if wake:
            self._server.loop.call_soon(self._continue)
        return True

    def wait_for_room(self, most: int, exchange: Exchange) -> bool:
        """Wait until no more than ``most`` bytes are queued; return False if the answer is no longer wanted."""
        with self.lock:
            while self.exchange is exchange and self.unsent > most:
                self.room.wait()
            return self.exchange is exchange

    def _taken_now(self, piece: bytes | memoryview) -> int:
        """Return how many bytes of a piece the socket takes without waiting; the caller holds the lock."""
        try:
            return self._link.send(piece)
        except OSError:
            return 0  # it is tried again from the queue, which tells the reasons apart

    def _queue(self, pieces: Sequence[bytes | memoryview]) -> None:
        for piece in pieces:
            view = memoryview(piece)
            if view.nbytes:
                self._output.append(view if view.format == "B" and view.ndim == 1 else view.cast("B"))
                self.unsent += view.nbytes

    def _finished(self, exchange: Exchange) -> None:
        self.exchange = None
        if not exchange.keep_alive:
            self._close_after_output = True
        seconds = self._server.settings.write_seconds if self.unsent else self._server.settings.idle_seconds
        self.deadline = time.monotonic() + seconds

    def _write(self) -> None:
        """Send as much as possible without blocking; the caller holds the lock."""
        output = self._output
        while output:
            try:
                if self._encrypted or len(output) == 1:
                    sent = self._link.send(output[0])
                else:
                    sent = self._link.sendmsg([output[at] for at in range(min(len(output), 64))])
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if _wants_more(error):
                    return
                self._broken = True
                return
            self.unsent -= sent
            self.deadline = time.monotonic() + self._server.settings.write_seconds
            while sent:
                if sent < len(output[0]):
                    output[0] = output[0][sent:]
                    break
                sent -= len(output.popleft())

    # In the loop's thread.

    def _continue(self) -> None:
        """Go on with output that a worker left to the loop."""
        if not self.closed:
            self._flush()

    def _flush(self) -> None:
        with self.lock:
            if self.closed:
                return
            self._write()
            self.room.notify_all()
            pending = bool(self._output)
            done = not pending and self.exchange is None
        if self._broken:
            self.close()
            return
        if done and (self._close_after_output or (self._ended and not self._reader.input)):
            self._close_or_drain()
            return
        if done and self._input_waits:
            self._input_waits = False
            self._advance()
        self._choose_events(pending)

    def _choose_events(self, pending: bool) -> None:
        if self.closed:
            return
        busy = self.exchange is not None or pending
        listens = not self._ended and not (busy and len(self._reader.input) >= _READ_AHEAD)
        mask = (READ if listens else 0) | (WRITE if pending else 0)
        if mask != self._mask:
            self._mask = mask
            self._server.loop.change(self._number, mask)
            if mask & READ and self._encrypted and self._link.pending():  # type: ignore[attr-defined]
                self._server.loop.call_soon(self._read)

    def _shake_hands(self) -> bool:
        try:
            self._link.do_handshake()  # type: ignore[attr-defined]
        except OSError as error:
            if _wants_more(error):
                self._mask = WRITE if _wants_to_write(error) else READ
                self._server.loop.change(self._number, self._mask)
            else:
                log.debug("a TLS handshake failed: %s", error)
                self.close()
            return False
        self._handshaking = False
        self._choose_events(False)
        return True

    def _read(self) -> None:
        if self.closed:
            return
        buffer = self._server.read_buffer
        for _ in range(_READS_A_TURN):
            try:
                count = self._link.recv_into(buffer)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if not _wants_more(error):
                    self.close()
                return
            if not count:
                self._on_end()
                return
            if self._draining:
                continue
            self._take(buffer[:count])
            # A short read has emptied the socket; TLS may hold a record back.
            if self.closed or (count < len(buffer) and not self._encrypted) or not self._mask & READ:
                return
        if self._encrypted and self._link.pending():  # type: ignore[attr-defined]
            self._server.loop.call_soon(self._read)

    def _on_end(self) -> None:
        """Handle the end of the client's data; it may still wait for its answer."""
        self._ended = True
        with self.lock:
            exchange = self.exchange
            pending = bool(self._output)
        if exchange is not None:
            exchange.request.client_gone = True
        if self._draining or (exchange is None and not pending):
            self.close()
        else:
            self._choose_events(pending)

    def _take(self, data: memoryview) -> None:
        reader = self._reader
        try:
            if not reader.begun and self.exchange is None and not self._output and not self._close_after_output:
                # As most requests come: whole, and one at a time.
                received = reader.at_once(data)
                if received is not None:
                    self._close_after_output = self._is_last
                    self._begin(received)
                    self._go_on()
                    return
                self.deadline = time.monotonic() + self._server.settings.head_seconds
            reader.take(data)
        except RefusedError as refused:
            self._refuse(refused)
            return
        self._advance()

    def _advance(self) -> None:
        """Begin each complete request once the previous one is answered."""
        try:
            while not self.closed and not self._draining:
                with self.lock:
                    if self.exchange is not None or self._output:
                        self._input_waits = bool(self._reader.input)
                        break
                if self._close_after_output:
                    break
                self._close_after_output = self._is_last
                if not self._next_request():
                    self._close_after_output = False
                    break
        except RefusedError as refused:
            self._refuse(refused)
            return
        self._go_on()

    def _go_on(self) -> None:
        with self.lock:
            pending = bool(self._output)
            busy = pending or self.exchange is not None
        if self._ended and not busy:
            self.close()
        else:
            self._choose_events(pending)

    def _next_request(self) -> bool:
        """Take one request out of the input; return False if it is not complete yet."""
        received = self._reader.next()
        if received is not None:
            self._begin(received)
        return received is not None

    def _begin(self, received: Received) -> None:
        self._taken += 1
        self._server.begin(self, received.head, received.body, received.held)

    def _on_head(self, waits: bool) -> None:
        """Give the client time for the body, and tell it to go on if it waits for that."""
        self.deadline = time.monotonic() + self._server.settings.body_seconds
        if waits:
            with self.lock:
                self._queue([b"HTTP/1.1 100 Continue\r\n\r\n"])
                self._write()

    def _refuse(self, refused: RefusedError) -> None:
        """Answer a request without reading it to its end, and close."""
        head = self._reader.head
        self._reader.drop()
        self._refused = True
        fields = (("Retry-After", "1"),) if refused.status == 503 else refused.fields
        self._server.refuse(self, error_response(refused.status, refused.text, fields), head)

    def _close_or_drain(self) -> None:
        """Close, or read on for a while: a client that is still sending would not see the answer of a closed
        connection."""
        if self._ended or self._draining or self._encrypted or not self._refused:
            self.close()
            return
        self._draining = True
        self.deadline = time.monotonic() + _DRAIN_SECONDS
        try:
            self._link.shutdown(socket.SHUT_WR)
        except OSError:
            self.close()
            return
        self._mask = READ
        self._server.loop.change(self._number, READ)


def _wants_more(error: OSError) -> bool:
    return type(error).__name__ in ("SSLWantReadError", "SSLWantWriteError")


def _wants_to_write(error: OSError) -> bool:
    return type(error).__name__ == "SSLWantWriteError"
