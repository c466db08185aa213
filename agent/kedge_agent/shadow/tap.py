"""Sends looked-at calls to a shadow, from a thread of its own: the call has been answered, and waits for nothing.

Where no shadow listens, a look costs one question whether its socket is there. What the shadow does not take in time is
dropped.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
from collections.abc import Mapping
from pathlib import Path

from kedge_agent.shadow import frames
from kedge_agent.shadow.frames import Array, Call

_WAITING = 2
_SECONDS = 1.0


class Tap:
    """The way of one model's calls to its shadow.

    Args:
        path: the shadow's socket, which comes and goes with it.
        digest: of the bundle whose calls these are.
    """

    def __init__(self, path: Path, digest: str) -> None:
        self._path = path
        self._digest = digest
        self._calls: queue.Queue[Call | None] = queue.Queue(_WAITING)
        self._thread: threading.Thread | None = None

    def show(self, nanoseconds: int, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Send a call if a shadow listens and has taken the last one; the arrays are copied."""
        if not self._path.exists() or self._calls.full():
            return
        if sum(array.nbytes for named in (inputs, outputs) for array in named.values()) > frames.MAX_BYTES:
            return
        copied = [{name: array.copy() for name, array in named.items()} for named in (inputs, outputs)]
        call = Call(digest=self._digest, nanoseconds=nanoseconds, inputs=copied[0], outputs=copied[1])
        if self._thread is None or not self._thread.is_alive():
            # A process that was forked has the object without the thread.
            self._calls = queue.Queue(_WAITING)
            self._thread = threading.Thread(target=self._run, args=(self._calls,), name="kedge-tap", daemon=True)
            self._thread.start()
        with contextlib.suppress(queue.Full):
            self._calls.put_nowait(call)

    def close(self) -> None:
        """End the thread, if there is one."""
        with contextlib.suppress(queue.Full):
            self._calls.put_nowait(None)

    def _run(self, calls: queue.Queue[Call | None]) -> None:
        link: socket.socket | None = None
        while (call := calls.get()) is not None:
            raw = frames.encode(call)
            if raw is None:
                continue
            try:
                if link is None:
                    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                    link.settimeout(_SECONDS)
                    with frames.address(self._path) as address:
                        link.connect(address)
                link.sendall(raw)
            except OSError:
                # Half a frame may be on its way: the next one begins on a new connection.
                if link is not None:
                    link.close()
                link = None
        if link is not None:
            link.close()
