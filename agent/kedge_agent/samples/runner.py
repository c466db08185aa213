"""The requests for samples of this device: takes or refuses them, listens for samples while some are collected, and
sends what was chosen."""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from kedge_agent.frame_sockets import FrameListener
from kedge_agent.samples.collection import Collection
from kedge_agent.slots import ModelFolder, Slot, model_folders
from kedge_agent.update import actions, events
from kedge_protocol import codec, files
from kedge_protocol.bundle.config import BundleConfig
from kedge_protocol.errors import KedgeError
from kedge_protocol.messages import Desired
from kedge_protocol.samples import Choice, ReportedSamples, SampleChunk, SampleRequest, SampleState

log = logging.getLogger(__name__)

DAY = 86400.0
REPORT_SECONDS = 5.0
"""Between two reports of nothing but how much was seen."""
_SENT_FILE = "sent.json"


@dataclass(frozen=True, kw_only=True)
class SampleLimits:
    """What this device sends at most, whatever it is asked for.

    Attributes:
        allow: whether it sends any at all.
        count, max_bytes: of one request.
        bytes_per_day: of all requests within 24 hours.
        seconds: how long it looks for one request.
    """

    allow: bool = False
    count: int = 200
    max_bytes: int = 8 << 20
    bytes_per_day: int = 32 << 20
    seconds: float = DAY


@dataclass(frozen=True, kw_only=True)
class _Sent:
    """``sent.json``: when (seconds since 1970) how many bytes were sent."""

    sent: tuple[tuple[float, int], ...] = ()


@dataclass
class _Open:
    collection: Collection
    ended: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None
    beside: tuple[str, str] | None = None
    """The bundle before and the one that serves, where this request runs the former as a shadow."""


class SampleRunner:
    """All requests of one device.

    Args:
        state: the agent's state folder.
        limits: what the device allows.
        signed: whether this device takes signed desired states only.
        send: publishes a chunk.
        shadow: starts and stops shadows.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        state: Path,
        limits: SampleLimits,
        *,
        signed: bool,
        send: Callable[[SampleChunk], None],
        shadow: Callable[[actions.StartShadow | actions.StopShadow], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._state = state
        self._folder = state / "samples"
        self._limits = limits
        self._signed = signed
        self._send = send
        self._shadow = shadow
        self._clock = clock
        self._lock = threading.Lock()
        self._open: dict[str, _Open] = {}
        self._refused: dict[str, ReportedSamples] = {}
        self._told: dict[str, ReportedSamples] = {}
        self._told_at = -REPORT_SECONDS
        self._tidy = False

    def reported(self) -> dict[str, ReportedSamples]:
        """Return what is reported, by model."""
        with self._lock:
            return self._reported()

    def answered(self, rid: str, received: int) -> None:
        """Handle the controller's answer to a chunk. Any thread may call it."""
        with self._lock:
            for model, one in self._open.items():
                if one.collection.request.rid == rid:
                    with self._failing(model, one):
                        one.collection.answered(received)

    def poll(self, now: float, desired: Desired | None, *, ready: bool) -> bool:
        """Go on with what is desired; call it often.

        Args:
            now: seconds of a monotonic clock.
            ready: whether a controller listens.

        Returns:
            Whether there is something new to report.
        """
        wanted = {} if desired is None else desired.samples
        shadowed = set() if desired is None else set(desired.shadows)
        with self._lock:
            self._follow(wanted, shadowed, now)
            for model, one in self._open.items():
                with self._failing(model, one):
                    self._go_on(model, one, shadowed, now, ready=ready)
            return self._is_news(now)

    def shadow_ended(self, event: events.ShadowEnded) -> None:
        """Handle the end of a shadow, if it was a request's own."""
        with self._lock:
            one = self._open.get(event.model)
            if one is not None and one.beside is not None and one.beside[0] == event.digest:
                one.beside = None
                self._end_listening(one)
                one.collection.fail(f"the bundle before cannot be run beside this one: {event.reason}")

    def close(self) -> None:
        """Stop listening; what was collected stays for the next start."""
        with self._lock:
            for one in self._open.values():
                one.ended.set()

    def _follow(self, wanted: Mapping[str, SampleRequest], shadowed: set[str], now: float) -> None:
        for model in list(self._open):
            if model not in wanted or wanted[model].rid != self._open[model].collection.request.rid:
                self._stop(model, self._open.pop(model))
        self._refused = {
            model: one for model, one in self._refused.items() if model in wanted and wanted[model].rid == one.rid
        }
        if not self._tidy:
            self._tidy = True
            self._remove_left_behind(wanted)
        for model, request in wanted.items():
            if model not in self._open and model not in self._refused:
                self._take(model, request, model in shadowed, now)

    def _remove_left_behind(self, wanted: Mapping[str, SampleRequest]) -> None:
        with contextlib.suppress(OSError):
            for path in self._folder.iterdir():
                if path.is_dir() and path.name not in wanted:
                    shutil.rmtree(path, ignore_errors=True)
        for folder in model_folders(self._state):
            for choice in Choice:
                # Where nobody listens, nobody needs to look for who does.
                with contextlib.suppress(OSError):
                    folder.sample_socket(choice).unlink()

    def _take(self, model: str, request: SampleRequest, shadowed: bool, now: float) -> None:
        try:
            problem = self._problem(model, request, shadowed=shadowed)
            if problem is None:
                bounded, detail = self._bounded(request)
                self._open[model] = _Open(Collection(self._folder / model, bounded, detail=detail, now=now))
                log.warning("%s: samples are collected for the fleet's operator (request %s)", model, request.rid)
                return
        except (OSError, KedgeError) as error:
            problem = f"it cannot be begun: {error}"
        log.warning("%s: no samples for request %s: %s", model, request.rid, problem)
        self._refused[model] = ReportedSamples(rid=request.rid, state=SampleState.REFUSED, detail=problem)

    def _problem(self, model: str, request: SampleRequest, *, shadowed: bool) -> str | None:
        if not self._limits.allow:
            return "this device sends no samples ([samples] allow in agent.toml)"
        if not self._signed:
            return "this device takes unsigned states ([trust] in agent.toml), and sends samples on signed ones only"
        current, previous = self._slots(model)
        if current is None:
            return "the model does not serve here"
        config = current.bundle().config
        if config.generation is not None:
            return "a language model has no samples of this kind"
        if request.where is Choice.LOW_CONFIDENCE and not _has_scores(config):
            return "no output of the model is scores of classes, from which a confidence could be taken"
        if request.where is Choice.DISAGREE and previous is None and not shadowed:
            return "nothing to disagree with: no shadow runs, and no bundle served before this one"
        if self._left() <= 0:
            return "this device has sent its share of today ([samples] mib_per_day in agent.toml)"
        return None

    def _bounded(self, request: SampleRequest) -> tuple[SampleRequest, str | None]:
        limits = self._limits
        bounded = replace(
            request,
            count=min(request.count, limits.count),
            max_bytes=min(request.max_bytes, limits.max_bytes, self._left()),
            seconds=min(request.seconds, limits.seconds),
        )
        if bounded == request:
            return request, None
        words = f"{bounded.count} samples, {bounded.max_bytes >> 10} KiB, {bounded.seconds:g} s"
        return bounded, f"this device allows at most {words}"

    def _go_on(self, model: str, one: _Open, shadowed: set[str], now: float, *, ready: bool) -> None:
        collection = one.collection
        if collection.state is SampleState.COLLECTING:
            if one.thread is None:
                self._listen(model, one)
            if collection.request.where is Choice.DISAGREE:
                self._see_to_a_shadow(model, one, wanted=model in shadowed)
            if collection.tick(now):
                self._end_listening(one)
                self._drop_shadow(model, one)
                self._finish(collection)
        elif ready:
            for chunk in collection.chunks(now):
                self._send(chunk)

    def _finish(self, collection: Collection) -> None:
        size = collection.finish()
        if size > self._left():
            collection.fail("this device has sent its share of today ([samples] mib_per_day in agent.toml)")
        elif size:
            sent = (*self._lately(), (self._clock(), size))
            files.write(self._folder / _SENT_FILE, codec.encode(_Sent(sent=sent)), mode=0o600)

    def _listen(self, model: str, one: _Open) -> None:
        asked = one.collection.request
        # What is larger could not be kept, and would take the agent's memory.
        listener = FrameListener(ModelFolder(self._state, model).sample_socket(asked.where), most=asked.max_bytes)
        name = f"kedge-samples-{model}"
        one.thread = threading.Thread(target=self._hear, args=(listener, one), name=name, daemon=True)
        one.thread.start()

    def _hear(self, listener: FrameListener, one: _Open) -> None:
        try:
            while not one.ended.is_set():
                for head, body in listener.receive(0.5):
                    try:
                        with self._lock:
                            one.collection.show(head, body)
                    except KedgeError:
                        listener.drop()
        finally:
            listener.close()

    @staticmethod
    def _end_listening(one: _Open) -> None:
        one.ended.set()

    def _see_to_a_shadow(self, model: str, one: _Open, *, wanted: bool) -> None:
        """Run the bundle before this one as a shadow, where the fleet wants none."""
        if wanted:
            one.beside = None
            return
        current, previous = self._slots(model)
        if current is None or previous is None:
            self._drop_shadow(model, one)
            return
        beside = (previous.digest, current.digest)
        if one.beside != beside:
            one.beside = beside
            self._shadow(
                actions.StartShadow(model=model, digest=beside[0], beside=beside[1], share=0.1, memory_bytes=512 << 20)
            )

    def _drop_shadow(self, model: str, one: _Open) -> None:
        if one.beside is not None:
            one.beside = None
            self._shadow(actions.StopShadow(model))

    def _stop(self, model: str, one: _Open) -> None:
        self._end_listening(one)
        self._drop_shadow(model, one)
        shutil.rmtree(self._folder / model, ignore_errors=True)
        log.info("%s: request %s for samples is over", model, one.collection.request.rid)

    @contextlib.contextmanager
    def _failing(self, model: str, one: _Open) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            log.exception("%s: samples", model)
            self._end_listening(one)
            self._drop_shadow(model, one)
            one.collection.fail(f"the disk: {error.strerror or error}")

    def _slots(self, model: str) -> tuple[Slot | None, Slot | None]:
        folder = ModelFolder(self._state, model)
        return folder.current(), folder.previous()

    def _lately(self) -> tuple[tuple[float, int], ...]:
        try:
            known = codec.decode((self._folder / _SENT_FILE).read_bytes(), _Sent, where=_SENT_FILE)
        except (OSError, KedgeError):
            return ()
        # What lies in the future was sent before the clock was set back: it counts.
        return tuple((at, size) for at, size in known.sent if at > self._clock() - DAY)

    def _left(self) -> int:
        return self._limits.bytes_per_day - sum(size for _, size in self._lately())

    def _reported(self) -> dict[str, ReportedSamples]:
        return self._refused | {model: one.collection.reported() for model, one in self._open.items()}

    def _is_news(self, now: float) -> bool:
        found = self._reported()
        if found == self._told:
            return False
        states = [{model: (one.rid, one.state) for model, one in told.items()} for told in (found, self._told)]
        if states[0] == states[1] and now - self._told_at < REPORT_SECONDS:
            return False
        self._told, self._told_at = found, now
        return True


def _has_scores(config: BundleConfig) -> bool:
    return any(
        len(spec.shape) == 2 and spec.batched and spec.shape[1 - spec.batch_axis] != 1 and "float" in spec.dtype
        for spec in config.outputs
    )
