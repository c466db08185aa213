"""Measures what one call of a compiled target costs on this host."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from kedge.evaluation import cost
from kedge.evaluation.dataset import Data
from kedge.search import trial
from kedge.search.results import Compiled
from kedge_protocol.bundle.config import Verified
from kedge_protocol.errors import KedgeError
from kedge_targets.worker import Worker


def measured(worker: Worker, one: Compiled, data: Data, scratch: Path, deadline: float) -> Compiled:
    """Return a compiled target, and its alternatives, with the cost of a call where the device's runtime runs in this
    process: a simulator's processor time says nothing."""
    if one.alternatives:
        others = tuple(measured(worker, other, data, scratch, deadline) for other in one.alternatives)
        one = replace(one, alternatives=others)
    if one.lowered.verified is not Verified.EXECUTED:
        return one
    name = one.candidate.backend.name
    program = trial.program(name, one.lowered, scratch / f"{one.target.name}-{name}-cost")
    try:
        found = worker.call(cost.TASK, cost.CostRequest(program=program, data=data), cost.Cost, deadline=deadline)
    except KedgeError:
        return one  # a bundle that holds is not lost for a figure
    return replace(one, cost=found)
