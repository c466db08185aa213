"""The training loop: the same bits each time, whatever interrupted it; never worse than what came in; never lost in
what is no number."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from kedge.training import loop
from kedge.training.checkpoint import Checkpoint
from kedge.training.loop import Schedule, train
from kedge_protocol.errors import DivergedError, StepError

Array = npt.NDArray[Any]
SCHEDULE = Schedule(steps=96, learning_rate=0.05, batch=8, seed=3)


class Stopped(BaseException):
    """Pulls the plug."""


class Line:
    """A line through noisy points; ``spoil`` may change a loss, given the number of the update."""

    def __init__(self, spoil: Callable[[int, torch.Tensor], torch.Tensor] | None = None) -> None:
        random = np.random.default_rng(0)
        self.training: Array = np.arange(50)
        self.parameter = torch.nn.Parameter(torch.zeros(4))
        self.seen: list[Array] = []
        self._x = torch.tensor(random.standard_normal((60, 4)), dtype=torch.float32)
        noise = 0.1 * random.standard_normal(60)
        self._y = self._x @ torch.tensor([1.0, -2, 3, 0.5]) + torch.tensor(noise, dtype=torch.float32)
        self._spoil = spoil or (lambda count, loss: loss)

    def loss(self, picked: Array, random: np.random.Generator) -> torch.Tensor:
        self.seen.append(picked)
        jitter = torch.tensor(random.standard_normal((len(picked), 4)) * 0.01, dtype=torch.float32)
        found = self._error(torch.from_numpy(picked), jitter)
        return self._spoil(len(self.seen), found)

    def judged(self) -> float:
        with torch.no_grad():
            return float(self._error(torch.arange(50, 60), torch.zeros(10, 4)))

    def _error(self, rows: torch.Tensor, jitter: torch.Tensor) -> torch.Tensor:
        return ((self._x[rows] + jitter) @ self.parameter - self._y[rows]).square().mean()


def bits(line: Line) -> bytes:
    return line.parameter.detach().numpy().tobytes()


def test_it_learns_and_says_how_far() -> None:
    line, told = Line(), []
    outcome = train([line.parameter], line, SCHEDULE, progress=lambda what, done, total: told.append((done, total)))
    assert outcome.after < 0.05 * outcome.before
    assert outcome.after == pytest.approx(line.judged())
    assert outcome.steps == 96
    assert told == [(step, 96) for step in range(1, 97)]


def test_the_same_seed_gives_the_same_bits_and_another_does_not() -> None:
    made = []
    for seed in (3, 3, 4):
        line = Line()
        train([line.parameter], line, dataclasses.replace(SCHEDULE, seed=seed))
        made.append(bits(line))
    assert made[0] == made[1] != made[2]


def test_each_sample_is_seen_once_an_epoch() -> None:
    line = Line()
    train([line.parameter], line, dataclasses.replace(SCHEDULE, patience=99))
    for epoch in range(16):
        assert sorted(np.concatenate(line.seen[6 * epoch : 6 * epoch + 6])) == list(range(50))
    assert not np.array_equal(np.concatenate(line.seen[:6]), np.concatenate(line.seen[6:12]))


@pytest.mark.parametrize("at", [1, 5, 40, 95])
def test_interrupted_anywhere_it_ends_in_the_same_bits(at: int, tmp_path: Path) -> None:
    whole = Line()
    train([whole.parameter], whole, SCHEDULE)

    def stop(what: str, done: int, total: int) -> None:
        if done == at:
            raise Stopped

    first = Line()
    with pytest.raises(Stopped):
        train([first.parameter], first, SCHEDULE, checkpoint=Checkpoint(tmp_path, "line", "a"), progress=stop)
    second = Line()
    outcome = train([second.parameter], second, SCHEDULE, checkpoint=Checkpoint(tmp_path, "line", "a"))
    assert bits(second) == bits(whole)
    # It is judged every fourth step, and saved then unless that would take too much of the time.
    assert outcome.resumed % 4 == 0
    assert outcome.resumed <= at
    assert outcome.resumed > 0 or at < 8
    # What is finished is not done again.
    third = Line()
    train([third.parameter], third, SCHEDULE, checkpoint=Checkpoint(tmp_path, "line", "a"))
    assert third.seen == []
    assert bits(third) == bits(whole)


def test_a_checkpoint_of_other_parts_or_a_damaged_one_is_not_gone_on_from(tmp_path: Path) -> None:
    line = Line()
    train([line.parameter], line, SCHEDULE, checkpoint=Checkpoint(tmp_path, "line", "a"))
    other = Line()
    outcome = train([other.parameter], other, SCHEDULE, checkpoint=Checkpoint(tmp_path, "line", "b"))
    assert outcome.resumed == 0
    assert len(other.seen) == 96
    damaged = Checkpoint(tmp_path, "line", "a")
    damaged.path.write_bytes(damaged.path.read_bytes()[:-100])
    again = Line()
    outcome = train([again.parameter], again, SCHEDULE, checkpoint=damaged)
    assert bits(again) == bits(line)
    assert "cannot be read" in outcome.notes[0]


def test_a_folder_that_cannot_be_written_is_noted_and_no_reason_to_stop(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    line = Line()
    outcome = train([line.parameter], line, SCHEDULE, checkpoint=Checkpoint(tmp_path / "file", "line", "a"))
    assert outcome.after < outcome.before
    assert "no checkpoint could be written" in outcome.notes[-1]
    assert len(outcome.notes) == 2  # and that none could be read; said once each


def test_a_loss_that_is_no_number_once_is_begun_again_with_a_lower_rate() -> None:
    line = Line(lambda count, loss: loss * float("nan") if count == 30 else loss)
    outcome = train([line.parameter], line, SCHEDULE)
    assert outcome.after < 0.3 * outcome.before
    assert "the loss was nan" in outcome.notes[0]
    assert "begun again at 0.01" in outcome.notes[0]


def test_a_loss_that_never_is_a_number_ends_it_and_leaves_the_model_as_it_was() -> None:
    line = Line(lambda count, loss: loss * float("inf"))
    before = bits(line)
    with pytest.raises(DivergedError, match="the loss was inf in epoch 1") as told:
        train([line.parameter], line, SCHEDULE, what="fine-tune")
    assert bits(line) == before
    assert "fine-tune" in str(told.value)
    assert "lower learning_rate" in str(told.value)


def test_what_was_learnt_before_the_numbers_ended_is_kept() -> None:
    line = Line(lambda count, loss: loss * float("nan") if count > 20 else loss)
    outcome = train([line.parameter], line, SCHEDULE)
    assert outcome.after < outcome.before
    assert line.judged() == pytest.approx(outcome.after)
    assert "what it had learnt before is kept" in outcome.notes[-1]


def test_a_rate_far_too_high_never_makes_it_worse() -> None:
    line = Line()
    outcome = train([line.parameter], line, dataclasses.replace(SCHEDULE, learning_rate=1e6, clip=1e9))
    assert outcome.after <= outcome.before
    assert line.judged() == pytest.approx(outcome.after)


def test_where_nothing_gets_better_it_goes_over_to_the_end_of_the_course() -> None:
    # From the 20th update on it climbs, so that nothing better is found.
    line = Line(lambda count, loss: loss if count <= 20 else -loss)
    patient = dataclasses.replace(SCHEDULE, patience=3)
    outcome = train([line.parameter], line, patient)
    # 20 steps, 3 judgements of 4 steps without gain, then from 70 % of the course again as many.
    assert 20 < outcome.steps < 60
    assert outcome.after < outcome.before


def test_before_the_first_step_the_loss_must_be_a_number() -> None:
    line = Line()
    with torch.no_grad():
        line.parameter.fill_(float("nan"))
    with pytest.raises(DivergedError, match="before the first step"):
        train([line.parameter], line, SCHEDULE)


def test_what_cannot_end_in_time_is_given_up_after_a_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    line = Line()
    # Each update takes ten seconds.
    monkeypatch.setattr(loop.time, "monotonic", lambda: 10.0 * len(line.seen))
    with pytest.raises(StepError, match=r"96 steps of 10\.0 s would take 16 minutes, and 4 are left") as stopped:
        train([line.parameter], line, SCHEDULE, seconds=300, what="fine-tune")
    assert (stopped.value.where, len(line.seen)) == ("fine-tune", 4)
    assert stopped.value.remedy
    line = Line()
    assert train([line.parameter], line, SCHEDULE, seconds=970).steps == 96
