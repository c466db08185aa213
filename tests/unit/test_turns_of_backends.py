"""What one backend tries leaves time for the backends whose turn is still to come."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import pytest

from kedge.evaluation.model import Model
from kedge.search.budget import Budget
from kedge.search.candidate import Candidate
from kedge.search.clock import Clock
from kedge.search.effort import Effort
from kedge.search.latency import LatencyLog
from kedge.search.options import CompileOptions
from kedge.search.results import Attempt, Failed, Job, Outcome
from kedge.search.search import Search
from kedge_protocol.errors import KedgeError, LoweringError, UnsupportedOperatorError
from kedge_targets import target

MODEL = Model(
    graph="g", digest="d", size_bytes=1, inputs=(), outputs=(), activation_bytes=1, fixed_batch=False, reference="g"
)


def job(folder: Path, clock: Clock, **options: Any) -> Job:
    asked = CompileOptions(
        name="n", version="1", targets=("intel-cpu",), calibration=folder, evaluation=folder, out=folder, **options
    )
    return Job(
        options=asked,
        budget=Budget(max_drop=0.0),
        model=MODEL,
        calibration=cast("Any", None),
        evaluation=cast("Any", None),
        preprocess={},
        reference=Future(),
        record=LatencyLog(),
        seed=0,
        scratch=folder,
        on_progress=lambda *told: None,
        clock=clock,
    )


class Trials:
    """Runs nothing; remembers for how many other backends a candidate left time.

    Args:
        seconds: that each candidate takes, by the clock.
    """

    first = cast("Any", None)

    def __init__(self, clock: Clock, error: KedgeError, seconds: float = 0.0) -> None:
        self._clock = clock
        self._error = error
        self._seconds = seconds
        self.seen: list[tuple[str, int]] = []

    def run(self, candidates: Sequence[Candidate], folders: Sequence[Path]) -> list[Outcome]:
        found = []
        for one, folder in zip(candidates, folders, strict=True):
            self.seen.append((one.backend.name, self._clock.waiting))
            attempt = Attempt(backend=one.backend.name, precision="int8")
            found.append(Outcome(candidate=one, attempt=attempt, plan=one.plan, folder=folder, error=self._error))
            self._clock.began -= self._seconds
        return found


def searched(folder: Path, clock: Clock, trials: Trials) -> list[str]:
    """The usual backends of intel-cpu, of which none can do anything."""
    device = target.find("intel-cpu")
    first = type("First", (), {"call": None})()
    local = cast("Any", type("Local", (), {"first": first})())
    search = Search(device, job(folder, clock), local, lambda: None, trials=cast("Any", trials))
    assert isinstance(search.run(), Failed)
    names = [one.name for one in device.backends if one.usual]
    assert len(names) == 2
    return names


def test_each_backend_leaves_as_much_to_those_that_wait(tmp_path: Path) -> None:
    clock = Clock.of(Effort.NORMAL, None)
    trials = Trials(clock, UnsupportedOperatorError("an operator"))
    names = searched(tmp_path, clock, trials)
    assert trials.seen == list(zip(names, (1, 0), strict=True))


def test_on_a_slow_machine_the_second_backend_has_as_much_time_as_the_first(tmp_path: Path) -> None:
    clock = Clock(limit=1e6)
    trials = Trials(clock, LoweringError("it cannot be converted"), seconds=1.2e5)
    first, second = searched(tmp_path, clock, trials)
    tried = [name for name, _ in trials.seen]
    # What repairs int8 is one batch: the first backend ends behind it, and the second comes to it.
    assert tried.count(first) > 2
    assert tried.count(second) > 2


@pytest.mark.parametrize(("waiting", "share"), [(0, 1.0), (1, 0.5), (3, 0.25)])
def test_a_step_may_take_its_part_of_the_time_left(tmp_path: Path, waiting: int, share: float) -> None:
    clock = Clock(limit=1e9, lenient=False)
    clock.begin_turn(waiting)
    assert job(tmp_path, clock, deadline=1e12).deadline == pytest.approx(1e9 * share, rel=1e-3)
    assert job(tmp_path, clock, deadline=60.0).deadline == 60.0
    clock.lenient = True
    assert job(tmp_path, clock, deadline=1e12).deadline == 1e12
