"""Sentences of the report about a drop, its interval, and the agreement."""

from __future__ import annotations

from kedge.evaluation.confidence_intervals import Interval
from kedge.evaluation.kinds import ClassifiedOutput
from kedge.search.budget import Budget
from kedge.search.cross_fitting import CrossFittedFigure


def is_shown(drop: float, interval: Interval | None, budget: Budget) -> bool | None:
    """Return whether the whole interval is within the budget; None if there is no interval."""
    return None if interval is None else max(drop, interval.high) <= budget.max_drop


def budget_statement(drop: float, interval: Interval | None, budget: Budget) -> str:
    """Return a sentence on whether the drop keeps the budget."""
    if not drop <= budget.max_drop:
        return "not kept"
    if interval is None:
        return "kept on these samples; the metric cannot be computed on drawn samples, so it has no interval"
    if interval.high <= budget.max_drop:
        return f"shown: {interval.confidence:.0%} sure within the budget"
    needed = interval.needed(drop, budget.max_drop)
    if needed is None:
        return "kept on these samples; the drop is all that is allowed, so no number of samples shows it"
    return f"kept on these samples; to show it takes about {_round(needed)}"


def sample_statement(unseen: CrossFittedFigure | None, count: int) -> str:
    """Return a sentence on the samples that the reported figure is measured on."""
    if unseen is None:
        return f"all {count} samples; the figure depends on no choice between candidates"
    if unseen.held:
        return f"{unseen.held} samples held back; the search and its choice saw the other {count - unseen.held}"
    return (
        f"{count} samples cross-fitted in {unseen.folds} folds: each by what was chosen without it; {unseen.same} of "
        "them take what was taken"
    )


def agreement_statement(kinds: tuple[ClassifiedOutput, ...]) -> str:
    """Return a sentence on why there is no agreement: the kind of every output."""
    return "no output is known to hold answers: " + "; ".join(
        f"{one.name} is {one.kind.value}, {one.why}" for one in kinds
    )


def _round(number: int) -> str:
    """Two digits."""
    digits = max(0, len(str(number)) - 2)
    return f"{round(number, -digits):,}".replace(",", " ")
