"""A compilation's cascade: settled by the larger model's server, its confidence chosen for each target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kedge.evaluation import cascade as evaluation
from kedge.evaluation.dataset import Data
from kedge.search import trial
from kedge.search.results import Compiled
from kedge_protocol.bundle.pipeline import Cascade, Scores
from kedge_protocol.errors import ConfigError, EndpointError
from kedge_targets.graph.signature import TensorInfo
from kedge_targets.pipeline.larger_model import LargerModel
from kedge_targets.worker import Worker

_SECONDS = 10.0
_FOREIGN, _OURS = "", "kedge_"


def settled(how: Cascade, inputs: Sequence[TensorInfo], where: str) -> Cascade:
    """Return a cascade with what the server's metadata determines filled in.

    Raises:
        ConfigError: the server does not answer, or its model takes other inputs.
    """
    try:
        found = LargerModel(how.url, how.model, how.version).metadata(_SECONDS)
    except EndpointError as error:
        raise ConfigError(
            f"[cascade]: the larger model cannot be asked: {error.what}",
            where=f"{where}, {error.where}",
            remedy="Start its server: the confidence is chosen, and the gain measured, by its answers",
        ) from error
    theirs = {one["name"]: one for one in found["inputs"]}
    names = how.inputs or tuple(theirs)
    if len(names) != len(inputs) or any(name not in theirs for name in names):
        raise ConfigError(
            f"[cascade]: the larger model takes {', '.join(theirs)}, this one {', '.join(one.name for one in inputs)}",
            where=where,
            remedy="Name the larger model's inputs in [cascade] inputs, in this model's order",
        )
    for name, own in zip(names, inputs, strict=True):
        shape = list(theirs[name].get("shape", ()))
        if not _fits(shape, own):
            mine = [-1 if axis is None else axis for axis in own.shape]
            raise ConfigError(
                f"[cascade]: the larger model's input {name!r} is {shape}, this model's {own.name!r} is {mine}",
                where=where,
                remedy="A cascade needs a larger model that takes the same inputs",
            )
    normalized = how.normalized
    if normalized is None:
        normalized = not str(found.get("platform", _FOREIGN)).startswith(_OURS)
    return replace(how, inputs=names, normalized=normalized)


def _fits(shape: Sequence[int], own: TensorInfo) -> bool:
    """Return whether a shape is an input's; some servers leave the batch out."""
    for wanted in (own.shape, own.shape[1:]):
        if len(shape) == len(wanted):
            pairs = list(zip(shape, wanted, strict=True))[1 if wanted is own.shape else 0 :]
            return all(there in (-1, here) or here is None for there, here in pairs)
    return False


@dataclass(kw_only=True)
class CascadeJob:
    """Measures the cascade of one compilation; the larger model is asked once for all targets.

    Attributes:
        how: the settled cascade, and ``scores`` the pipeline's.
    """

    how: Cascade
    scores: Scores
    asked: evaluation.AskAnswer | None = None

    def measured(self, worker: Worker, one: Compiled, data: Data, scratch: Path, deadline: float) -> Compiled:
        """Return a compiled target with its cascade's figures.

        Raises:
            EndpointError: the larger model refuses.
            DatasetError: the evaluation data has no labels, and no confidence is stated.
        """
        if one.alternatives:
            others = tuple(self.measured(worker, other, data, scratch, deadline) for other in one.alternatives)
            one = replace(one, alternatives=others)
        place = f"{one.target.name}-{one.candidate.backend.name}-cascade"
        program = trial.program(one.candidate.backend.name, one.lowered, scratch / place)
        file = str((scratch / "larger-model.npz").absolute())
        how = self.how
        if self.asked is None:
            request = evaluation.AskRequest(program=program, cascade=how, scores=self.scores, data=data, file=file)
            self.asked = worker.call(evaluation.ASK, request, evaluation.AskAnswer, deadline=deadline)
        if how.activation is None:
            how = self.how = replace(how, activation=self.asked.activation)
        if how.below is not None and data.label is None:
            return replace(one, larger=how)  # without labels nothing is right or wrong
        measure = evaluation.MeasureRequest(program=program, cascade=how, scores=self.scores, data=data, file=file)
        figures = worker.call(evaluation.MEASURE, measure, evaluation.CascadeFigures, deadline=deadline)
        figures = replace(figures, model=f"{how.model} {self.asked.version}".strip())
        return replace(one, cascade=figures, larger=replace(how, below=figures.below))
