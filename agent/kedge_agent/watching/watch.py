"""Runs a model's pipeline over frames. It keeps to the pace of its source: frames that come while the model still
computes are dropped and counted, so that an answer is never older than one call."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import Any

from kedge_agent.model import Model
from kedge_agent.watching.frames import Frame, Source
from kedge_agent.watching.outputs import Output
from kedge_protocol.errors import InputError

log = logging.getLogger("kedge.watch")

_WARN_SECONDS = 10.0
_LOOK_SECONDS = 0.5
"""Seconds within which a request to stop is seen while no frame comes."""


@dataclass
class Summary:
    """What became of the frames."""

    answered: int = 0
    dropped: int = 0
    failed: int = 0

    def __str__(self) -> str:
        return f"{self.answered} frames answered, {self.dropped} dropped, {self.failed} unreadable"


def watch(
    model: Model,
    source: Source,
    output: Output,
    *,
    fps: float | None = None,
    stop: threading.Event | None = None,
) -> Summary:
    """Answer the frames of a source until it ends.

    Each record of the output has the frame's number (``frame``) and file (``name``), the Unix time of the answer
    (``at``), the model's ``version``, the call's duration (``ms``), the number of frames that were ``dropped`` since
    the last record, and the pipeline's ``answer`` or, for a frame that cannot be read, an ``error``.

    Args:
        model: a model with a pipeline for pictures.
        source: see :func:`kedge_agent.watching.frames.open_source`.
        output: takes a record for each frame that is not dropped.
        fps: pace of a source that is not live, in frames a second; None for the rate at which it was recorded, 0 to
            answer every frame, however long that takes.
        stop: set to end early.

    Raises:
        InputError: the model takes no pictures, or the source cannot be read.
    """
    declared = model.config.pipeline
    if declared is None or declared.picture is None:
        raise InputError(
            f"the model {model.name!r} takes no pictures", remedy="Compile it with --task, e.g. --task detection"
        )
    ended = stop or threading.Event()
    latest = _Latest()
    pace = source.rate if fps is None else fps
    reader = threading.Thread(target=_read, args=(source, latest, pace, ended), name="kedge-frames", daemon=True)
    reader.start()
    summary, warned = Summary(), 0.0
    try:
        while (taken := latest.take(ended)) is not None:
            frame, dropped = taken
            summary.dropped += dropped
            if dropped and time.monotonic() - warned > _WARN_SECONDS:
                warned = time.monotonic()
                log.warning("the model is slower than its source: %d frames dropped so far", summary.dropped)
            output.write(_answered(model, frame, dropped, summary))
    finally:
        ended.set()
        latest.end(None)
        output.close()
        summary.dropped += latest.dropped
    return summary


def _answered(model: Model, frame: Frame, dropped: int, summary: Summary) -> dict[str, Any]:
    from kedge_targets.pipeline.answers import to_json

    record: dict[str, Any] = {"frame": frame.number}
    if frame.name:
        record["name"] = frame.name
    began = time.perf_counter()
    try:
        loaded = model.loaded()
        if loaded.pipeline is None:
            raise InputError("the bundle that answers now has no pipeline", where=model.name)
        answer = loaded.pipeline(frame.item, loaded.named, other=model.other)
        summary.answered += 1
        outcome = {"version": loaded.version, "answer": to_json(answer)}
    except InputError as error:
        summary.failed += 1
        outcome = {"error": str(error)}
    took = round((time.perf_counter() - began) * 1000, 3)
    return {**record, "at": round(time.time(), 3), "ms": took, "dropped": dropped, **outcome}


class _Latest:
    """Holds the latest frame until it is taken."""

    def __init__(self) -> None:
        self.dropped = 0
        self._changed = threading.Condition()
        self._frame: Frame | None = None
        self._ended = False
        self._error: Exception | None = None

    def put(self, frame: Frame, *, wait: bool) -> None:
        """Replace the frame; with ``wait``, first wait until it was taken."""
        with self._changed:
            while wait and self._frame is not None and not self._ended:
                self._changed.wait()
            self.dropped += self._frame is not None
            self._frame = frame
            self._changed.notify_all()

    def take(self, stop: threading.Event) -> tuple[Frame, int] | None:
        """Wait for a frame; return it with the number of dropped ones before it, or None at the end or once ``stop`` is
        set.

        Raises:
            The source's error, at the end.
        """
        with self._changed:
            while self._frame is None and not self._ended and not stop.is_set():
                self._changed.wait(_LOOK_SECONDS)
            if stop.is_set():
                return None
            frame, self._frame = self._frame, None
            dropped, self.dropped = self.dropped, 0
            self._changed.notify_all()
            if frame is None and self._error is not None:
                raise self._error
            return None if frame is None else (frame, dropped)

    def end(self, error: Exception | None) -> None:
        """No more frames will come."""
        with self._changed:
            self._ended = True
            self._error = error
            self._changed.notify_all()


def _read(source: Source, latest: _Latest, pace: float | None, stop: threading.Event) -> None:
    every = not source.live and not pace
    began = time.monotonic()
    error: Exception | None = None
    try:
        for frame in source.frames(stop.is_set):
            if pace and not source.live:
                stop.wait(max(0.0, began + frame.number / pace - time.monotonic()))
            if stop.is_set():
                break
            latest.put(frame, wait=every)
    except Exception as caught:  # noqa: BLE001 -- raised again where the frames are taken
        error = caught
    latest.end(error)
