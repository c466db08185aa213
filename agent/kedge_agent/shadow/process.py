"""The shadow's process: loads a bundle that does not serve, listens for looked-at calls, answers them, and compares.

``python -m kedge_agent.shadow --folder SLOT --socket PATH --beside DIGEST --share 0.1``

It runs at the lowest priority, and rests after each answer so that it takes no more than its share of a core. Each
second it writes a line of JSON (:class:`kedge_protocol.messages.ShadowTelemetry`) to its output, if there is news. No
input leaves it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from kedge_agent import malloc
from kedge_agent.loaded import Loaded, warm_up
from kedge_agent.shadow import frames
from kedge_agent.shadow.comparing import Figures
from kedge_agent.shadow.frames import Array, Call
from kedge_agent.slots import Slot
from kedge_protocol import codec, latency_buckets, tensors
from kedge_protocol.bundle.config import TensorSpec
from kedge_protocol.errors import InputError, KedgeError
from kedge_targets.executor import Executor

_REPORT_SECONDS = 1.0
_PATIENCE = 5.0
"""Seconds within which a frame must be whole."""


def load(folder: Path) -> Loaded:
    """Load a slot's bundle without counting its calls.

    Raises:
        KedgeError: the runtime refuses it, or it is a language model.
    """
    bundle = Slot(folder, "").bundle()
    if bundle.config.generation is not None:
        raise InputError("a language model has no shadow", where=bundle.config.name)
    executor = Executor.of(folder, bundle.config)
    warm_up(executor)
    return Loaded(bundle, executor, None)


class ShadowProcess:
    """Answers calls beside the bundle that serves.

    Args:
        loaded: the shadow.
        beside: digest of the bundle that serves; calls of others are dropped.
        share: share of a core.
    """

    def __init__(self, loaded: Loaded, *, beside: str, share: float) -> None:
        self._loaded = loaded
        self._beside = beside
        self._share = share
        self.figures = Figures()

    def answer(self, call: Call) -> float:
        """Answer and compare one call; return the seconds to rest after it."""
        if call.digest != self._beside:
            return 0.0
        began, worked = time.perf_counter_ns(), time.thread_time()
        config = self._loaded.bundle.config
        try:
            found = self._loaded.answer(dict(call.inputs), {})
            took = time.perf_counter_ns() - began
            named = found if isinstance(found, dict) else {config.outputs[0].name: found}
            old = {spec.name: _rows(call.outputs[spec.name], spec) for spec in config.outputs}
            new = {spec.name: _rows(named[spec.name], spec) for spec in config.outputs}
            self.figures.add(config.outputs, old, new)
            self.figures.old[latency_buckets.bucket_of(max(0, call.nanoseconds))] += 1
            self.figures.new[latency_buckets.bucket_of(took)] += 1
        except Exception:  # noqa: BLE001 -- whatever a runtime raises counts against the shadow
            self.figures.errors += 1
        return (time.thread_time() - worked) * (1 / self._share - 1)

    def run(self, listening: socket.socket) -> None:
        """Answer calls until the process is ended."""
        links: list[socket.socket] = []
        sent = time.monotonic()
        while True:
            ready, _, _ = select.select([listening, *links], [], [], _REPORT_SECONDS)
            for link in ready:
                if link is listening:
                    accepted, _ = listening.accept()
                    accepted.settimeout(_PATIENCE)
                    links.append(accepted)
                    continue
                call = _read(link)
                if call is None:
                    links.remove(link)
                    link.close()
                else:
                    time.sleep(self.answer(call))
            if time.monotonic() - sent >= _REPORT_SECONDS:
                sent = time.monotonic()
                self._send()

    def _send(self) -> None:
        if self.figures.compared or self.figures.errors:
            message = self.figures.message(self._loaded.digest)
            self.figures = Figures()
            sys.stdout.buffer.write(codec.encode(message) + b"\n")
            sys.stdout.buffer.flush()


def _rows(array: Array, spec: TensorSpec) -> Array:
    return array[None] if array.ndim < len(spec.shape) else tensors.to_batch_first(array, spec)


def _read(link: socket.socket) -> Call | None:
    """Return the next call; None at the end of the connection, and where what comes is none."""
    try:
        size_of_head, size_of_body = frames.LENGTH.unpack(_exactly(link, frames.LENGTH.size))
        if size_of_head > frames.MAX_HEAD or size_of_body > frames.MAX_BYTES:
            return None
        return frames.decode(_exactly(link, size_of_head), _exactly(link, size_of_body))
    except (OSError, EOFError, InputError):
        return None


def _exactly(link: socket.socket, size: int) -> bytes:
    return b"".join(_pieces(link, size))


def _pieces(link: socket.socket, size: int) -> Iterator[bytes]:
    while size:
        piece = link.recv(min(size, 1 << 20))
        if not piece:
            raise EOFError
        size -= len(piece)
        yield piece


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``python -m kedge_agent.shadow``; see the module."""
    parser = argparse.ArgumentParser(prog="python -m kedge_agent.shadow", description="Run a bundle as a shadow.")
    parser.add_argument("--folder", type=Path, required=True, help="the bundle's slot")
    parser.add_argument("--socket", type=Path, required=True, help="where to listen for calls")
    parser.add_argument("--beside", required=True, help="digest of the bundle that serves")
    parser.add_argument("--share", type=float, required=True, help="share of a processor core")
    given = parser.parse_args(arguments)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    malloc.one_arena()
    _be_nice()
    try:
        process = ShadowProcess(load(given.folder), beside=given.beside, share=given.share)
        with contextlib.suppress(FileNotFoundError):
            given.socket.unlink()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
            with frames.address(given.socket) as address:
                listening.bind(address)
            # Applications of any user show their calls; nobody reads those of another.
            given.socket.chmod(0o622)
            listening.listen(8)
            process.run(listening)
    except (KedgeError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def _be_nice() -> None:
    os.nice(19)
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
