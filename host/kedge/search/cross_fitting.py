"""The figure of the chosen candidate on samples that the choice did not use: on those that were held back, where there
are plenty (:mod:`kedge.search.held_back`), else by cross-fitting.

The evaluation set is divided into folds. For each fold the choice is made again from the candidates' figures on all
other folds, and the chosen candidate is measured on that fold; all folds together give the figure. If every fold
chooses the same candidate, this is its figure on all samples, without selection bias. Nothing is run again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kedge.evaluation import confidence_intervals, resampling
from kedge.evaluation.confidence_intervals import Interval
from kedge.evaluation.metric import Choice, Score
from kedge.evaluation.resampling import Rows
from kedge.search import held_back, pareto
from kedge.search.budget import Budget


@dataclass(frozen=True, kw_only=True)
class MeasuredCandidate:
    """A candidate's measured point, and its score on all samples."""

    point: pareto.Point
    score: Score


@dataclass(frozen=True, kw_only=True)
class CrossFittedFigure:
    """The figure of a choice on samples that it did not use.

    Attributes:
        value: of the metric; ``drop`` against the float model's, with its ``interval``.
        folds: number of folds; ``same`` of them chose the candidate that was chosen on all samples.
        held: number of samples that the search never saw, on which alone this is the figure; 0 where the figure is
            cross-fitted.
    """

    value: float
    drop: float
    interval: Interval | None
    folds: int
    same: int
    held: int = 0


def cross_fit(
    taken: MeasuredCandidate,
    candidates: Sequence[MeasuredCandidate],
    *,
    reference: Score,
    choice: Choice,
    budget: Budget,
    confidence: float,
) -> CrossFittedFigure | None:
    """Return the figure on the samples that are held back, where there are plenty, else the cross-fitted one; None if
    there was only one candidate, or the metric cannot be computed on some samples alone.

    Args:
        taken: the candidate chosen on all samples.
        candidates: all candidates of the choice, including ``taken``.
        reference: the float model's score.
    """
    part = held_back.part(reference, *(one.score for one in candidates))
    if part is not None:
        return _of_held(taken.score, reference, part, choice, confidence)
    if len(candidates) < 2:
        return None
    if all(one.score.rows is not None for one in candidates) and reference.rows is not None:
        return _of_rows(taken, candidates, reference, choice, budget, confidence)
    return _of_calls(taken, candidates, reference, choice, budget)


def _of_held(
    taken: Score, reference: Score, part: resampling.Array, choice: Choice, confidence: float
) -> CrossFittedFigure:
    wanted, found = (held_back.within(choice, one, part) for one in (reference, taken))
    return CrossFittedFigure(
        value=found.value,
        drop=choice.drop(wanted.value, found.value),
        interval=confidence_intervals.of_drop(choice, wanted, found, confidence),
        folds=0,
        same=0,
        held=len(part),
    )


def _of_rows(
    taken: MeasuredCandidate,
    candidates: Sequence[MeasuredCandidate],
    reference: Score,
    choice: Choice,
    budget: Budget,
    confidence: float,
) -> CrossFittedFigure:
    wanted = _rows(reference)
    rows = {one.point.key: _rows(one.score) for one in candidates}
    parts = resampling.folds(len(wanted))
    pooled, same = np.array(rows[taken.point.key]), 0
    for part in parts:
        outside = np.setdiff1d(np.arange(len(wanted)), part)
        whole = choice.aggregate(wanted[outside])
        drops = {key: choice.drop(whole, choice.aggregate(found[outside])) for key, found in rows.items()}
        picked = _picked(taken, candidates, drops, budget)
        same += picked == taken.point.key
        pooled[part] = rows[picked][part]
    value = choice.aggregate(pooled)
    score = Score(value=value, samples=len(pooled), rows=Rows.of(pooled))
    return CrossFittedFigure(
        value=value,
        drop=choice.drop(reference.value, value),
        interval=confidence_intervals.of_drop(choice, reference, score, confidence),
        folds=len(parts),
        same=same,
    )


def _of_calls(
    taken: MeasuredCandidate, candidates: Sequence[MeasuredCandidate], reference: Score, choice: Choice, budget: Budget
) -> CrossFittedFigure | None:
    """Compute the figure from the values on each fold and on the samples outside of it."""
    parts = resampling.folds(reference.samples)
    count = len(parts)
    calls = [reference.again, *(one.score.again for one in candidates)]
    if any(len(one) < resampling.CALLS + 2 * count or None in one[resampling.CALLS :] for one in calls):
        return None
    outside = {one.point.key: one.score.again[resampling.CALLS :][:count] for one in candidates}
    within = {one.point.key: one.score.again[resampling.CALLS + count :] for one in candidates}
    whole = reference.again[resampling.CALLS :]
    drop, same = 0.0, 0
    for number, part in enumerate(parts):
        drops = {key: choice.drop(whole[number] or 0.0, found[number] or 0.0) for key, found in outside.items()}
        picked = _picked(taken, candidates, drops, budget)
        same += picked == taken.point.key
        weight = len(part) / reference.samples
        drop += weight * choice.drop(whole[count + number] or 0.0, within[picked][number] or 0.0)
    if same == count:
        return CrossFittedFigure(value=taken.score.value, drop=taken.point.drop, interval=None, folds=count, same=same)
    value = reference.value - choice.drop(1.0, 0.0) * drop
    return CrossFittedFigure(value=value, drop=drop, interval=None, folds=count, same=same)


def _picked(
    taken: MeasuredCandidate, candidates: Sequence[MeasuredCandidate], drops: dict[str, float], budget: Budget
) -> str:
    """Return the key of the candidate that would be chosen with these drops."""
    points = [
        dataclasses.replace(
            one.point, drop=drops[one.point.key], upper=_shifted(one.point.upper, drops[one.point.key] - one.point.drop)
        )
        for one in candidates
    ]
    found = pareto.choose(points, budget)
    return taken.point.key if found is None else found.key


def _shifted(upper: float | None, by: float) -> float | None:
    return None if upper is None else upper + by


def _rows(score: Score) -> resampling.Array:
    return np.zeros((0,)) if score.rows is None else score.rows.array
