"""Device and cloud together: what the device's model is not sure of goes to a larger model, within a share and a
deadline.

The device's answer is there first, and is given whenever the larger model's is not: when it is away, late or refuses,
when the share is used up, or after several failures in a row (then it is left alone for a while, and tried again with
one item).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.bundle.config import BundleConfig, TensorSpec
from kedge_protocol.bundle.pipeline import Cascade, Pipeline, Scores
from kedge_protocol.errors import EndpointError, InputError, KedgeError
from kedge_targets.pipeline import normalization, scores
from kedge_targets.pipeline.answers import Label
from kedge_targets.pipeline.execution import Context, Other, Raw, Runner
from kedge_targets.pipeline.larger_model import LargerAnswer, LargerModel
from kedge_targets.pipeline.others import CONSENT

log = logging.getLogger("kedge.pipeline")

Array = npt.NDArray[Any]

BURST = 10.0
"""Items that may be passed on at once where few were before."""
AT_ONCE = 8
"""The maximum number of calls of the larger model at the same time."""
FAILURES = 3
"""Failures in a row after which the larger model is left alone."""
_PAUSES = (1.0, 60.0)
"""Seconds for which it is left alone: at first, and at most (they double)."""


@dataclass
class CascadeCounts:
    """What became of the items.

    Attributes:
        sure: the device's model was sure.
        escalated: the larger model answered.
        away: the larger model did not answer in time, or refused; the device's answer was given.
        withheld: the share was used up.
        paused: the larger model was left alone after failures, or had too many calls at once.
        under_way: calls of the larger model that have not ended, late ones too.
    """

    sure: int = 0
    escalated: int = 0
    away: int = 0
    withheld: int = 0
    paused: int = 0
    under_way: int = 0

    @property
    def items(self) -> int:
        """Return the number of all items but those whose answer is still awaited."""
        return self.sure + self.escalated + self.away + self.withheld + self.paused


class Gate:
    """Decides whether an item may be passed on: the share, the calls at once, and the circuit breaker. Any thread may
    use it.

    Args:
        share: the maximum fraction of the items.
        clock: seconds of a monotonic clock.
    """

    def __init__(self, share: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.counts = CascadeCounts()
        self._share = share
        self._clock = clock
        self._lock = threading.Lock()
        self._credit = 1.0
        self._failures = 0
        self._pause = _PAUSES[0]
        self._closed_until = 0.0

    def passes(self, *, sure: bool) -> bool:
        """Count an item, and return whether it is passed on; then :meth:`ended` must be called."""
        with self._lock:
            self._credit = min(self._credit + self._share, BURST)
            if sure:
                self.counts.sure += 1
            elif self._credit < 1:
                self.counts.withheld += 1
            elif self._is_paused():
                self.counts.paused += 1
            else:
                self._credit -= 1
                self.counts.under_way += 1
                return True
            return False

    def answered(self) -> None:
        """Note that the larger model answered in time."""
        with self._lock:
            self.counts.escalated += 1
            self._failures, self._pause = 0, _PAUSES[0]

    def failed(self) -> None:
        """Note that the larger model did not answer in time, or refused."""
        with self._lock:
            self.counts.away += 1
            self._failures += 1
            if self._failures == FAILURES:
                self._closed_until = self._clock() + self._pause

    def ended(self) -> None:
        """Note that a call has ended, however late."""
        with self._lock:
            self.counts.under_way -= 1

    def _is_paused(self) -> bool:
        if self.counts.under_way >= AT_ONCE:
            return True
        if self._failures < FAILURES:
            return False
        now = self._clock()
        if now < self._closed_until:
            return True
        # One item tries; until it is answered, or failed and the longer pause is over, the others stay here.
        self._pause = min(2 * self._pause, _PAUSES[1])
        self._closed_until = now + self._pause
        return False


class Escalation:
    """One item: the device's answer, and perhaps the larger model's on its way."""

    def __init__(self, local: list[Label], gate: Gate, end: float = 0.0) -> None:
        self.by: tuple[str, str] | None = None
        """Name and version of the larger model that gave the answer; None if the device's model did."""
        self._answer = local
        self._gate = gate
        self._end = end
        self._done = threading.Event()
        self._found: tuple[list[Label], tuple[str, str]] | None = None

    @property
    def waits(self) -> bool:
        """Return whether the larger model was asked, and :meth:`answer` may wait for it."""
        return self._end > 0

    def answer(self) -> list[Label]:
        """Return the larger model's answer if it comes by the deadline, else the device's; to be called once."""
        if not self.waits:
            return self._answer
        self._done.wait(max(0.0, self._end - time.monotonic()))
        if self._found is None:
            self._gate.failed()
        else:
            self._answer, self.by = self._found
            self._gate.answered()
        return self._answer

    def ask(self, call: Callable[[float], tuple[list[Label], tuple[str, str]]]) -> None:
        """Call the larger model; runs in a thread of its own, which may outlive the deadline.

        Args:
            call: gets the seconds that are left.
        """
        try:
            self._found = call(self._end - time.monotonic())
        except KedgeError as error:
            log.debug("%s", error)
        except Exception:
            log.exception("the larger model could not be asked")
        finally:
            self._done.set()
            self._gate.ended()


class CascadeRunner(Runner):
    """A pipeline that passes on what its model is not sure of. Its calls wait for the larger model within the deadline;
    :meth:`begin` does not.

    Raises:
        ConfigError: see :class:`kedge_targets.pipeline.larger_model.LargerModel`.
    """

    def __init__(
        self, pipeline: Pipeline, inputs: Sequence[TensorSpec], labels: Sequence[str], read: Callable[[str], str]
    ) -> None:
        super().__init__(pipeline, inputs, labels, read)
        if pipeline.cascade is None or pipeline.scores is None:
            raise InputError("the pipeline names no larger model, or has no scores")
        self.how: Cascade = pipeline.cascade
        self.gate = Gate(self.how.share)
        self._own: Scores = pipeline.scores
        self._larger = LargerModel(self.how.url, self.how.model, self.how.version)
        self._sent = Inputs(self.how, inputs)

    def __call__(self, item: Any, raw: Raw, *, other: Other | None = None) -> Any:
        """See :meth:`Runner.__call__`."""
        if isinstance(item, list):
            started = [self.begin(one, raw) for one in item]
            return [one.answer() for one in started]
        return self.begin(item, raw).answer()

    def begin(self, item: Any, raw: Raw) -> Escalation:
        """Answer one item by the device's model, and ask the larger one if it is not sure."""
        feeds, context = self.prepare(item)
        return self._begun(raw(feeds), context)

    def prepare(self, item: Any, *, where: str = "") -> tuple[dict[str, Array], Context]:
        """See :meth:`Runner.prepare`; the context holds the inputs for the larger model."""
        feeds, context = super().prepare(item, where=where)
        return feeds, replace(context, feeds=feeds)

    def finish(self, outputs: Mapping[str, Array], context: Context, *, other: Other | None = None) -> Any:
        """See :meth:`Runner.finish`."""
        return self._begun(outputs, context).answer()

    def _begun(self, outputs: Mapping[str, Array], context: Context) -> Escalation:
        local = super().finish(outputs, context)
        values = outputs[self._own.output] if self._own.output else next(iter(outputs.values()))
        sure = confidences(np.asarray(values), self._own)[0] >= (self.how.below or 0.0)
        if not self.gate.passes(sure=bool(sure)):
            return Escalation(local, self.gate)
        one = Escalation(local, self.gate, time.monotonic() + self.how.deadline_ms / 1000)
        feeds, classes = context.feeds or {}, np.asarray(values)[0].size

        def call(seconds: float) -> tuple[list[Label], tuple[str, str]]:
            answer = self._larger.infer(self._sent(feeds), seconds, output=self.how.output)
            found = larger_scores(answer, self.how.output, classes, where=self._larger.where)[0]
            how = replace(self._own, activation=self.how.activation)
            by = f"{self.how.model} {answer.version}".strip()
            labels = [replace(label, by=by) for label in scores.best(found, how, self.labels)]
            return labels, (self.how.model, answer.version)

        try:
            threading.Thread(target=one.ask, args=(call,), name="kedge-cascade", daemon=True).start()
        except RuntimeError:  # no thread to be had
            self.gate.ended()
            self.gate.failed()
            return Escalation(local, self.gate)
        return one


class Inputs:
    """Makes the larger model's inputs from raw samples of this model's.

    Args:
        how: the settled cascade.
        specs: this model's inputs.
    """

    def __init__(self, how: Cascade, specs: Sequence[TensorSpec]) -> None:
        self._names = dict(zip((spec.name for spec in specs), how.inputs, strict=False))
        self._turns = {spec.name: _turned(spec) for spec in specs if how.normalized}

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Return the larger model's inputs; samples along the first axis."""
        made = {}
        for name, array in feeds.items():
            turn = self._turns.get(name)
            made[self._names.get(name, name)] = array if turn is None else turn(array)
        return made


def _turned(spec: TensorSpec) -> normalization.Prepared:
    if spec.preprocess is not None:
        return normalization.prepared(spec.preprocess, layout=spec.layout, rank=len(spec.shape))
    return lambda raw: raw.astype(spec.dtype)


def runner_of(folder: Path, config: BundleConfig) -> Runner | None:
    """Return the pipeline of a bundle as :meth:`Runner.of` does, with its larger model if it names one and this device
    allows it (:data:`kedge_targets.pipeline.others.CONSENT`)."""
    cascade = None if config.pipeline is None else config.pipeline.cascade
    allowed = os.environ.get(CONSENT) == "on"
    if cascade is not None and not allowed:
        log.info("%s names a larger model at %s, which this device does not allow", config.name, cascade.url)
    kind = Runner if cascade is None or cascade.below is None or not allowed else CascadeRunner
    return kind.of(folder, config)


def confidences(values: Array, how: Scores) -> Array:
    """Return the best score of each sample, ``[N]``; 0 where there is none (NaN).

    Args:
        values: a model's scores, ``[N, ...]``.
    """
    found = scores.activated(values.reshape(len(values), -1), how.activation)
    return np.asarray(np.nan_to_num(found, nan=0.0, posinf=0.0, neginf=0.0).max(axis=-1))


def larger_scores(answer: LargerAnswer, output: str, classes: int, *, where: str) -> Array:
    """Return the larger model's scores, ``[N, classes]``.

    Raises:
        EndpointError: there is no such output, or it has another number of classes.
    """
    name = output or next(iter(answer.outputs), "")
    if name not in answer.outputs:
        there = ", ".join(answer.outputs) or "none"
        raise EndpointError(f"the larger model has no output {name!r}; it has {there}", where=where)
    values = answer.outputs[name]
    if values.ndim < 1 or not len(values) or values[0].size != classes:
        shape = "x".join(map(str, values.shape))
        raise EndpointError(
            f"the larger model's output {name!r} is {shape}; this model has {classes} classes", where=where
        )
    return values.reshape(len(values), -1)
