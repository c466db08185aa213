"""The training loop: Adam with warm-up and cosine schedule, keeping the best state and recovering from failures."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kedge.training.checkpoint import Checkpoint, State
from kedge_protocol.errors import DivergedError, StepError

Array = npt.NDArray[Any]
Tensor: TypeAlias = torch.Tensor

_ROUNDS = 24
_SLOWER = 5.0
_RETRIES = 2
_COOLING = 0.7
"""Share of the schedule after which the learning rate is low. A training that stops improving skips to this point: low
bit widths gain most from the small steps at the end."""
_PACED = 3
"""Steps after which it is known how long one takes; the first is not counted."""
_NOTHING = 1e-9
"""A loss up to this leaves nothing to learn."""


class Objective(Protocol):
    """The objective of a training."""

    training: Array
    """Indices of the training samples."""

    def loss(self, picked: Array, random: np.random.Generator) -> Tensor:
        """Return the mean loss over the samples, to be minimized; ``random`` is for augmentation."""

    def judged(self) -> float:
        """Return the loss over the held-out samples."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The schedule of a training.

    Attributes:
        steps: largest number of updates.
        learning_rate: at the peak of the cosine.
        batch: samples per update.
        patience: evaluations without improvement before training skips to the end of the schedule, or stops there.
        warm_up: share of the steps over which the learning rate rises.
        weight_decay: of AdamW; 0 gives Adam.
        clip: largest norm of the gradient.
        seed: of order and augmentation.
    """

    steps: int
    learning_rate: float
    batch: int
    patience: int = 8
    warm_up: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0


@dataclass(kw_only=True)
class Outcome:
    """The outcome of a training; the parameters hold the best state.

    Attributes:
        before, after: held-out loss of the initial and of the final parameters; ``after`` is never larger.
        steps: updates made by the last attempt.
        resumed: the step at which a checkpoint was resumed; 0 without one.
        notes: for the reader of the report.
    """

    before: float
    after: float
    steps: int
    resumed: int = 0
    notes: list[str] = field(default_factory=list)


def train(
    parameters: Iterable[torch.nn.Parameter],
    objective: Objective,
    schedule: Schedule,
    *,
    what: str = "training",
    checkpoint: Checkpoint | None = None,
    seconds: float | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Outcome:
    """Train parameters in place.

    The parameters are evaluated at intervals on the held-out samples; the best state, which may be the initial one, is
    kept. If the loss becomes infinite or NaN, or nothing better is found, training restarts from the best state with a
    fifth of the learning rate, at most twice. The same parameters, objective and seed give the same bits on the same
    number of threads, whether training was interrupted or not.

    Args:
        what: name of the training, for messages.
        checkpoint: to resume from, and to save to.
        seconds: the training must end within; None for no limit. It is never cut short, since how far it came would
            depend on the machine: one that cannot end in time is given up after a few steps.

    Raises:
        StepError: at the pace of the first steps, not even one that soon stops improving would.
        DivergedError: the loss became infinite or NaN in every attempt, and none had improved before. The parameters
            keep their initial values.
    """
    run = _Run(list(parameters), objective, schedule, what, checkpoint, _Pace(schedule, seconds, what), progress)
    return run.through()


class _Pace:
    """Gives up a training that cannot end in time."""

    def __init__(self, schedule: Schedule, seconds: float | None, what: str) -> None:
        self._steps, self._what = schedule.steps, what
        # However early it stops improving, it makes these steps before it skips to the end, and then those at the end.
        stale = schedule.patience * _every(schedule)
        self._least = min(schedule.steps, stale + min(stale, schedule.steps - _cooling(schedule)))
        self._end = math.inf if seconds is None else time.monotonic() + seconds
        self._times: list[float] = []

    def check(self, step: int) -> None:
        """Take the time of a step.

        Args:
            step: how many were made, those before a checkpoint among them.
        """
        self._times.append(time.monotonic())
        if len(self._times) <= _PACED:
            return
        each = (self._times[-1] - self._times[0]) / (len(self._times) - 1)
        left = self._end - self._times[-1]
        if each * (self._least - step) > left:
            raise StepError(
                f"{self._steps} steps of {each:.1f} s would take {each * self._steps / 60:.0f} minutes, "
                f"and {max(0.0, left) / 60:.0f} are left",
                where=self._what,
                remedy="Give the search more time, or fewer steps or a smaller batch in a recipe",
            )


def _every(schedule: Schedule) -> int:
    """Return after how many steps it is judged."""
    return max(1, schedule.steps // _ROUNDS)


def _cooling(schedule: Schedule) -> int:
    """Return the step from which on the learning rate is low."""
    return round(schedule.steps * _COOLING)


class _Run:
    def __init__(
        self,
        parameters: list[torch.nn.Parameter],
        objective: Objective,
        schedule: Schedule,
        what: str,
        checkpoint: Checkpoint | None,
        pace: _Pace,
        progress: Callable[[str, int, int], None],
    ) -> None:
        self._parameters = parameters
        self._objective = objective
        self._schedule = schedule
        self._what = what
        self._checkpoint = checkpoint
        self._pace = pace
        self._progress = progress
        self._every = _every(schedule)
        self._notes: list[str] = []
        self._resumed = 0

    def through(self) -> Outcome:
        state = self._begun()
        while not state.finished:
            optimizer = self._optimizer(state)
            try:
                self._attempt(state, optimizer)
            except _LeftNumbersError as gone:
                self._again(state, gone)
                continue
            if state.best_loss >= state.before and state.attempt < _RETRIES:
                self._slower(state)
                continue
            state.finished = True
            if self._checkpoint is not None:
                self._checkpoint.save(state)
        self._put(state.best)
        notes = self._notes + ([] if self._checkpoint is None else self._checkpoint.notes)
        return Outcome(
            before=state.before,
            after=state.best_loss,
            steps=state.step - state.skipped,
            resumed=self._resumed,
            notes=notes,
        )

    def _begun(self) -> State:
        found = None if self._checkpoint is None else self._checkpoint.load()
        if found is not None:
            self._resumed = found.step
            self._put(found.parameters)
            return found
        before = self._objective.judged()
        if not math.isfinite(before):
            raise DivergedError(
                f"the loss is {before} before the first step",
                where=self._what,
                remedy="Check the calibration samples, and your own loss where you gave one",
            )
        copies = self._copies()
        return State(
            step=0,
            skipped=0,
            learning_rate=self._schedule.learning_rate,
            before=before,
            best_loss=before,
            stale=0,
            attempt=0,
            finished=not self._parameters or before <= _NOTHING,
            parameters=copies,
            best=copies,
            optimizer=None,
        )

    def _optimizer(self, state: State) -> torch.optim.Optimizer:
        made = torch.optim.AdamW(
            self._parameters, lr=state.learning_rate, weight_decay=self._schedule.weight_decay, foreach=False
        )
        if state.optimizer is not None:
            made.load_state_dict(state.optimizer)
        return made

    def _attempt(self, state: State, optimizer: torch.optim.Optimizer) -> None:
        schedule = self._schedule
        while state.step < schedule.steps:
            if state.stale >= schedule.patience and not self._cooled(state):
                return
            picked = self._picked(state.step)
            for group in optimizer.param_groups:
                group["lr"] = state.learning_rate * self._factor(state.step)
            optimizer.zero_grad()
            loss = self._objective.loss(picked, np.random.default_rng([schedule.seed, 3, state.step]))
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self._parameters, schedule.clip)
            if not math.isfinite(float(loss.detach())) or not math.isfinite(float(norm)):
                raise _LeftNumbersError(float(loss.detach()), self._epoch(state.step), state.learning_rate)
            optimizer.step()
            state.step += 1
            self._progress(self._what, state.step, schedule.steps)
            self._pace.check(state.step)
            if state.step % self._every == 0 or state.step == schedule.steps:
                self._judge(state, optimizer)

    def _cooled(self, state: State) -> bool:
        """Skip from the best state to the end of the schedule; return False if it is already there."""
        cooling = _cooling(self._schedule)
        if state.step >= cooling:
            return False
        self._put(state.best)
        state.skipped += cooling - state.step
        state.step, state.stale = cooling, 0
        return True

    def _judge(self, state: State, optimizer: torch.optim.Optimizer) -> None:
        loss = self._objective.judged()
        if not math.isfinite(loss):
            raise _LeftNumbersError(loss, self._epoch(state.step - 1), state.learning_rate)
        state.parameters = self._copies()
        if loss < state.best_loss:
            state.best, state.best_loss, state.stale = state.parameters, loss, 0
        else:
            state.stale += 1
        if self._checkpoint is not None:
            state.optimizer = optimizer.state_dict()
            self._checkpoint.offer(state)

    def _again(self, state: State, gone: _LeftNumbersError) -> None:
        """Restart from the best state with a lower learning rate, or give up."""
        said = f"the loss was {gone.loss} in epoch {gone.epoch} at learning rate {gone.learning_rate:g}"
        if state.attempt >= _RETRIES:
            if state.best_loss < state.before:
                self._notes.append(f"{self._what}: {said}, for the last time; what it had learnt before is kept")
                state.finished = True
                return
            self._put(state.best)
            raise DivergedError(
                f"{said}, and {_RETRIES} attempts with a lower learning rate ended so too",
                where=self._what,
                remedy="Give a lower learning_rate, or leave this step out; the model is as it was before it",
            )
        self._notes.append(f"{self._what}: {said}; begun again at {state.learning_rate / _SLOWER:g}")
        self._slower(state)

    def _slower(self, state: State) -> None:
        """Restart from the best state with a lower learning rate."""
        self._put(state.best)
        state.attempt += 1
        state.learning_rate /= _SLOWER
        state.step, state.skipped, state.stale = 0, 0, 0
        state.optimizer, state.parameters = None, state.best

    def _picked(self, step: int) -> Array:
        """Return the samples of one update: each sample once per epoch, in an order set by the seed."""
        pool, batch = self._objective.training, self._schedule.batch
        each = max(1, len(pool) // batch)
        order = np.random.default_rng([self._schedule.seed, 2, step // each]).permutation(len(pool))
        start = (step % each) * batch
        # What is left over at the end joins the last batch of the epoch, so that nothing is never seen.
        stop = len(pool) if step % each == each - 1 and len(pool) - start < 2 * batch else start + batch
        return pool[order[start:stop]]

    def _epoch(self, step: int) -> int:
        return step // max(1, len(self._objective.training) // self._schedule.batch) + 1

    def _factor(self, step: int) -> float:
        """Return the factor of the learning rate: a linear warm-up, then half a cosine (Loshchilov, Hutter, "SGDR",
        2017)."""
        rise = max(1, round(self._schedule.steps * self._schedule.warm_up))
        if step < rise:
            return (step + 1) / rise
        done = (step - rise) / max(1, self._schedule.steps - rise)
        return 0.5 * (1 + math.cos(math.pi * done))

    def _copies(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self._parameters]

    def _put(self, values: list[Tensor]) -> None:
        """Set the parameters and evaluate them, so that whatever the objective caches between steps (a weight's stored
        form) belongs to these parameters, as when they were first evaluated."""
        with torch.no_grad():
            for parameter, value in zip(self._parameters, values, strict=True):
                parameter.copy_(value)
        self._objective.judged()


class _LeftNumbersError(ArithmeticError):
    def __init__(self, loss: float, epoch: int, learning_rate: float) -> None:
        super().__init__(loss, epoch, learning_rate)
        self.loss, self.epoch, self.learning_rate = loss, epoch, learning_rate
