"""The one training loop: Adam, a warm-up and a cosine, the best state kept, and a way back after anything."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kedge.training.checkpoint import Checkpoint, State
from kedge_protocol.errors import DivergedError

Array = npt.NDArray[Any]
Tensor: TypeAlias = torch.Tensor

_ROUNDS = 24
_SLOWER = 5.0
_RETRIES = 2
_COOLING = 0.7
"""Share of the course after which the learning rate is low. A training that finds nothing better goes on from there: it
is by the small steps at the end that low bits gain most."""
_NOTHING = 1e-9
"""A loss that leaves nothing to learn."""


class Objective(Protocol):
    """What is trained, and for what."""

    training: Array
    """Indices of samples to learn from."""

    def loss(self, picked: Array, random: np.random.Generator) -> Tensor:
        """The mean loss over the samples, to be made smaller; ``random`` for augmentation."""

    def judged(self) -> float:
        """The loss over the samples that are held back."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast.

    Attributes:
        steps: updates at most.
        learning_rate: at the top of the cosine.
        batch: samples an update.
        patience: judgements without an improvement before it goes over to the end of the course, or stops there.
        warm_up: share of the steps over which the learning rate rises.
        weight_decay: of AdamW; 0 is Adam.
        clip: largest norm of a gradient.
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
    """What came of it; the parameters hold the best state.

    Attributes:
        before, after: the held-back loss of what came in and of what goes out; ``after`` is never larger.
        steps: updates made by the attempt that counted.
        resumed: the step that a checkpoint let it go on from; 0 without.
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
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Outcome:
    """Train in place.

    It is judged now and then on the samples held back; the best state is kept, that which came in among them. Where the
    loss leaves the numbers, or nothing better is found, it goes back to the best state with a fifth of the learning
    rate, twice at most. The same parameters, objective and seed give the same bits on the same number of threads,
    whether it was interrupted or not.

    Args:
        what: its name, for messages.
        checkpoint: where to go on from, and to leave what was reached.

    Raises:
        DivergedError: not one attempt stayed in the numbers, and none got better before it left them. The parameters
            hold what came in.
    """
    run = _Run(list(parameters), objective, schedule, what, checkpoint, progress)
    return run.through()


class _Run:
    def __init__(
        self,
        parameters: list[torch.nn.Parameter],
        objective: Objective,
        schedule: Schedule,
        what: str,
        checkpoint: Checkpoint | None,
        progress: Callable[[str, int, int], None],
    ) -> None:
        self._parameters = parameters
        self._objective = objective
        self._schedule = schedule
        self._what = what
        self._checkpoint = checkpoint
        self._progress = progress
        self._every = max(1, schedule.steps // _ROUNDS)
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
            if state.step % self._every == 0 or state.step == schedule.steps:
                self._judge(state, optimizer)

    def _cooled(self, state: State) -> bool:
        """From the best state to the end of the course; False where it is there already."""
        cooling = round(self._schedule.steps * _COOLING)
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
        """Back to the best state, slower; or the end."""
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
        """From the best state on, with steps that are smaller."""
        self._put(state.best)
        state.attempt += 1
        state.learning_rate /= _SLOWER
        state.step, state.skipped, state.stale = 0, 0, 0
        state.optimizer, state.parameters = None, state.best

    def _picked(self, step: int) -> Array:
        """Samples of one update: each sample once in an epoch, in an order of the seed's."""
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
        """Of the learning rate: a straight rise, then half a cosine (Loshchilov, Hutter, "SGDR", 2017)."""
        rise = max(1, round(self._schedule.steps * self._schedule.warm_up))
        if step < rise:
            return (step + 1) / rise
        done = (step - rise) / max(1, self._schedule.steps - rise)
        return 0.5 * (1 + math.cos(math.pi * done))

    def _copies(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self._parameters]

    def _put(self, values: list[Tensor]) -> None:
        """Set the parameters, and judge them: whatever the objective keeps of others from step to step (a weight's
        stored form) is of these then, as it was when they were judged first."""
        with torch.no_grad():
            for parameter, value in zip(self._parameters, values, strict=True):
                parameter.copy_(value)
        self._objective.judged()


class _LeftNumbersError(ArithmeticError):
    def __init__(self, loss: float, epoch: int, learning_rate: float) -> None:
        super().__init__(loss, epoch, learning_rate)
        self.loss, self.epoch, self.learning_rate = loss, epoch, learning_rate
