"""A training of one backend leaves time for the backends whose turn is still to come."""

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
from kedge_protocol.errors import UnsupportedOperatorError
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
    """Runs nothing; remembers for how many other backends a candidate left time."""

    first = cast("Any", None)

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.seen: list[tuple[str, int]] = []

    def run(self, candidates: Sequence[Candidate], folders: Sequence[Path]) -> list[Outcome]:
        found = []
        for one, folder in zip(candidates, folders, strict=True):
            self.seen.append((one.backend.name, self._clock.waiting))
            attempt = Attempt(backend=one.backend.name, precision="int8")
            error = UnsupportedOperatorError("an operator")
            found.append(Outcome(candidate=one, attempt=attempt, plan=one.plan, folder=folder, error=error))
        return found


def test_each_backend_leaves_as_much_to_those_that_wait(tmp_path: Path) -> None:
    clock = Clock.of(Effort.NORMAL, None)
    trials = Trials(clock)
    device = target.find("intel-cpu")
    first = type("First", (), {"call": None})()
    local = cast("Any", type("Local", (), {"first": first})())
    search = Search(device, job(tmp_path, clock), local, lambda: None, trials=cast("Any", trials))
    assert isinstance(search.run(), Failed)
    names = [one.name for one in device.backends if one.usual]
    assert len(names) > 1
    assert trials.seen == list(zip(names, reversed(range(len(names))), strict=True))


@pytest.mark.parametrize(("waiting", "share"), [(0, 1.0), (1, 0.5), (3, 0.25)])
def test_a_step_may_take_its_part_of_the_time_left(tmp_path: Path, waiting: int, share: float) -> None:
    clock = Clock(limit=1e9, lenient=False, waiting=waiting)
    assert job(tmp_path, clock, deadline=1e12).deadline == pytest.approx(1e9 * share, rel=1e-3)
    assert job(tmp_path, clock, deadline=60.0).deadline == 60.0
    clock.lenient = True
    assert job(tmp_path, clock, deadline=1e12).deadline == 1e12
