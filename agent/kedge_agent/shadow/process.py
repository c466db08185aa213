"""The shadow's process: loads a bundle that does not serve, listens for looked-at calls, answers them, and compares.

``python -m kedge_agent.shadow --folder SLOT --socket PATH --beside DIGEST --share 0.1``

It runs at the lowest priority, and rests after each answer so that it takes no more than its share of a core. Each
second it writes a line of JSON (:class:`kedge_protocol.messages.ShadowTelemetry`) to its output, if there is news. No
input leaves it, except to the agent while that collects samples on which the two bundles disagree.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from kedge_agent import malloc
from kedge_agent.frame_sockets import FrameListener, FrameSender
from kedge_agent.loaded import Loaded, warm_up
from kedge_agent.samples import single
from kedge_agent.shadow.comparing import Figures
from kedge_agent.slots import Slot
from kedge_protocol import codec, frames, latency_buckets
from kedge_protocol.errors import InputError, KedgeError
from kedge_protocol.frames import Call
from kedge_targets.executor import Executor

_REPORT_SECONDS = 1.0


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
        samples: where samples with other answers go while somebody listens; None for nowhere.
    """

    def __init__(self, loaded: Loaded, *, beside: str, share: float, samples: Path | None = None) -> None:
        self._loaded = loaded
        self._samples = None if samples is None else FrameSender(samples)
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
            old = {spec.name: single.rows(call.outputs[spec.name], spec) for spec in config.outputs}
            new = {spec.name: single.rows(named[spec.name], spec) for spec in config.outputs}
            alike = self.figures.add(config.outputs, old, new)
            self.figures.old[latency_buckets.bucket_of(max(0, call.nanoseconds))] += 1
            self.figures.new[latency_buckets.bucket_of(took)] += 1
            if alike is not None and not alike.all() and self._samples is not None and self._samples.wanted():
                for one in single.disagreeing(call, config, alike):
                    self._samples.send(frames.encode(one))
        except Exception:  # noqa: BLE001 -- whatever a runtime raises counts against the shadow
            self.figures.errors += 1
        return (time.thread_time() - worked) * (1 / self._share - 1)

    def run(self, listening: FrameListener) -> None:
        """Answer calls until the process is ended."""
        sent = time.monotonic()
        while True:
            for head, body in listening.receive(_REPORT_SECONDS):
                try:
                    call = frames.decode(head, body)
                except InputError:
                    listening.drop()
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``python -m kedge_agent.shadow``; see the module."""
    parser = argparse.ArgumentParser(prog="python -m kedge_agent.shadow", description="Run a bundle as a shadow.")
    parser.add_argument("--folder", type=Path, required=True, help="the bundle's slot")
    parser.add_argument("--socket", type=Path, required=True, help="where to listen for calls")
    parser.add_argument("--samples", type=Path, help="where samples with other answers go")
    parser.add_argument("--beside", required=True, help="digest of the bundle that serves")
    parser.add_argument("--share", type=float, required=True, help="share of a processor core")
    given = parser.parse_args(arguments)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    malloc.one_arena()
    _be_nice()
    try:
        process = ShadowProcess(load(given.folder), beside=given.beside, share=given.share, samples=given.samples)
        process.run(FrameListener(given.socket))
    except (KedgeError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def _be_nice() -> None:
    os.nice(19)
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
