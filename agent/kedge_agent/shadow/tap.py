"""Sends looked-at calls to a shadow, and single samples to the agent while it collects some, from a thread of its own:
the call has been answered, and waits for nothing.

Where nobody listens, a look costs two questions whether a socket is there. What is not taken in time is dropped.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from kedge_agent.frame_sockets import FrameSender
from kedge_agent.samples import single
from kedge_agent.slots import ModelFolder
from kedge_protocol import frames
from kedge_protocol.bundle.config import BundleConfig
from kedge_protocol.frames import Call
from kedge_protocol.samples import Choice

Array = npt.NDArray[Any]
_WAITING = 2


class Tap:
    """The way of one model's calls to who looks at them.

    Args:
        folder: the model's; its sockets come and go with who listens.
        digest, config: of the bundle whose calls these are.
    """

    def __init__(self, folder: ModelFolder, digest: str, config: BundleConfig) -> None:
        self._shadow = FrameSender(folder.shadow_socket)
        self._samples = FrameSender(folder.sample_socket(Choice.LOW_CONFIDENCE))
        self._digest = digest
        self._config = config
        self._calls: queue.Queue[Call | None] = queue.Queue(_WAITING)
        self._thread: threading.Thread | None = None

    def show(self, nanoseconds: int, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Send a call if somebody listens and has taken the last one; the arrays are copied."""
        if not (self._shadow.wanted() or self._samples.wanted()) or self._calls.full():
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
        while (call := calls.get()) is not None:
            if self._shadow.wanted():
                self._shadow.send(frames.encode(call))
            if self._samples.wanted() and (unsure := single.least_sure(call, self._config)) is not None:
                self._samples.send(frames.encode(unsure))
        self._shadow.close()
        self._samples.close()
