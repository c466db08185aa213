"""Samples that a search never sees: where there are plenty, the last fifth is held back, and what is chosen is measured
on it alone. With fewer samples that would cost too much, and :mod:`kedge.search.cross_fitting` takes its place."""

from __future__ import annotations

import numpy as np

from kedge.evaluation import resampling
from kedge.evaluation.metric import Choice, Score
from kedge.evaluation.resampling import Array, Rows

PLENTY = 2000
"""Samples of the evaluation set from which on some are held back: 400 show a difference of one point in most cases."""


def part(*scores: Score) -> Array | None:
    """Return the indices of the samples that are held back, the same for the same number of samples; None where these
    are too few, or where a score is not made of what each sample contributes."""
    if any(one.rows is None for one in scores) or scores[0].rows is None:
        return None
    count = scores[0].rows.shape[0]
    return resampling.folds(count)[-1] if count >= PLENTY else None


def within(choice: Choice, score: Score, indices: Array) -> Score:
    """Return the score on these samples."""
    return _of(choice, score, indices)


def outside(choice: Choice, score: Score, indices: Array) -> Score:
    """Return the score on all samples but these."""
    return _of(choice, score, np.setdiff1d(np.arange(score.samples), indices))


def _of(choice: Choice, score: Score, indices: Array) -> Score:
    if score.rows is None:
        raise ValueError("a score without rows has no part")
    rows = score.rows.array[indices]
    return Score(value=choice.aggregate(rows), samples=len(rows), rows=Rows.of(rows))
