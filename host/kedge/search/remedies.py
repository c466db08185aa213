"""Says what a user can do where no candidate keeps the budget."""

from __future__ import annotations

from kedge.search.effort import Effort
from kedge.search.results import Job, Outcome
from kedge_targets import executor


def of(best: Outcome, job: Job, *, time_is_up: bool, from_recipe: bool) -> str:
    """Return what would let the nearest candidate, or another, keep the budget, as one sentence.

    Args:
        time_is_up: the search ended by ``--time-limit``.
        from_recipe: there was no search, but one candidate from a recipe.
    """
    found = []
    if best.lowered is not None and any(executor.filled_sizes(spec) for spec in best.lowered.inputs):
        found.append(
            "this target needs samples of one length, so shorter ones are filled up with zeros: give the model a "
            "mask or the length as an input that hides them, or compile a release for each range of lengths"
        )
    if "output" in best.over:
        found.append("give calibration samples like those of the evaluation")
    limit = job.budget.max_drop
    if "drop" in best.over and best.attempt.drop is not None and best.attempt.drop <= limit:
        found.append("give more evaluation samples: it is the interval that exceeds the budget, not the drop")
    elif "drop" in best.over:
        found.append("allow more with --max-drop, or give more calibration samples")
    elif "agreement" in best.over:
        found.append("allow less with --min-agreement, or give more calibration samples")
    if best.over.keys() & {"size", "latency"}:
        found.append("allow more with --max-size or --max-latency, or take a smaller model")
    if time_is_up:
        found.append("give the search more with --time-limit")
    elif job.options.effort is not Effort.HIGH and not from_recipe:
        found.append("search on with --effort high")
    text = "; ".join(found)
    return text[:1].upper() + text[1:]
