"""Pruning from start to end, as the steps of a recipe request it: find groups, rank, choose, cut, report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kedge.pruning import importance, model_cost, selection, surgery
from kedge.pruning.groups import Group, Kind, Structure, structure
from kedge.pruning.importance import Importance, Norm, Scores
from kedge.pruning.selection import Kept, Limits, Ranking, Target
from kedge.pruning.sensitivity import Probe
from kedge_protocol.errors import ConfigError, StepError

if TYPE_CHECKING:
    import onnx

    from kedge.step import Context

_LEVELS = 8
"""Number of parts into which a group is divided to measure the effect of losing them."""


@dataclass(frozen=True, kw_only=True)
class PruningRequest:
    """What is pruned, and how; see the options of the steps."""

    step: str
    kinds: tuple[Kind, ...]
    what: str
    ratio: float
    importance: Importance
    ranking: Ranking = Ranking.LAYER
    target: Target = Target.CHANNELS
    norm: Norm = Norm.L2
    layers: Mapping[str, float] = field(default_factory=dict)
    leave: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    rounds: int = 1
    samples: int = 64

    def check(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: a number is out of range.
        """
        where = f"step {self.step!r}"
        if not 0 <= self.ratio < 1:
            raise ConfigError(f"ratio {self.ratio} is not from 0 to below 1", where=where)
        if not 0 < self.limits.most <= 1:
            raise ConfigError(f"most {self.limits.most} is not from above 0 to 1", where=where)
        for name, value in (
            ("rounds", self.rounds),
            ("samples", self.samples),
            ("least", self.limits.least),
            ("multiple_of", self.limits.multiple),
        ):
            if value < 1:
                raise ConfigError(f"{name} {value} is below 1", where=where)


def prune(model: onnx.ModelProto, context: Context, how: PruningRequest) -> onnx.ModelProto:
    """Return the graph without the least important channels of some kinds; figures and notes go to the context.

    Raises:
        StepError: nothing of these kinds can be cut, or gradients cannot be computed.
        ConfigError: a number is out of range, or a layer's name is unknown.
        UnsupportedOperatorError, ModelError: ONNX Runtime does not load the graph.
    """
    how.check()
    example = {name: array.shape for name, array in next(context.samples.batches(1)).items()}
    found = structure(model, example)
    before = model_cost.parameters(found.model), model_cost.operations(found.scope)
    first = {group.name: group.size for group in _groups(found, how)}
    # A group of which one channel is left is no group any more.
    left = dict.fromkeys(first, 1)
    operations = before[1]
    made = model
    for number in range(how.rounds):
        if number:
            found = structure(made, example)
        removed = _chosen(found, context, how, first, how.ratio * (number + 1) / how.rounds, before[1])
        left |= {group.name: group.size - len(channels) for group, channels in removed.items()}
        operations = model_cost.operations(found.scope, found.alive(removed.items()))
        if any(removed.values()):
            made = surgery.cut(found, removed.items())
    _note_result(context, how, first, left, before, (model_cost.parameters(made), operations))
    return made


def _groups(found: Structure, how: PruningRequest) -> tuple[Group, ...]:
    groups = found.of_kinds(*how.kinds)
    if not groups:
        raise StepError(
            f"finds no {how.what} that could be cut without changing the model's inputs or outputs",
            where=f"step {how.step!r}",
            remedy="Leave this step out of the recipe",
        )
    return groups


def _chosen(
    found: Structure, context: Context, how: PruningRequest, first: Mapping[str, int], ratio: float, operations: int
) -> dict[Group, list[int]]:
    """Return the channels to remove, so that ``ratio`` of the original amount is gone."""
    groups = tuple(group for group in found.of_kinds(*how.kinds) if group.name in first)

    def allowed(group: Group, wanted: float) -> int:
        return how.limits.kept(group.size, first[group.name], wanted)

    own: Kept = {}
    for group, share in selection.named(groups, how.layers, how.leave).items():
        wanted = first[group.name] * (1 - share * ratio / how.ratio if how.ratio else 1 - share)
        own[group] = group.size if share == 0 else allowed(group, wanted)
    probe = None
    if how.importance is Importance.MEASURED:
        probe = Probe(found, groups, context, how.samples)
    scores = _scores(found, groups, context, how, probe)

    def reached(kept: Kept) -> float:
        if how.target is Target.CHANNELS:
            return 1 - sum(kept.values()) / sum(first.values())
        alive = found.alive(selection.lowest(scores, kept).items())
        return 1 - model_cost.operations(found.scope, alive) / max(1, operations)

    if probe is not None:
        harm = _harm(groups, scores, allowed, probe, context)
        kept = selection.by_harm(harm, reached, ratio, own)
    elif how.ranking is Ranking.GLOBAL:
        kept = selection.by_score(scores, allowed, reached, ratio, own)
    else:
        kept = _evenly(groups, first, allowed, reached, ratio, own, how.target)
    return selection.lowest(scores, kept)


def _evenly(
    groups: Sequence[Group], first: Mapping[str, int], allowed: selection.Allowed, reached: selection.Reached,
    ratio: float, own: Kept, target: Target,
) -> Kept:  # fmt: skip
    """Return the numbers left after removing the same share of each group; if operations are the target, the smallest
    share that removes enough of them."""

    def left(share: float) -> Kept:
        return {group: allowed(group, first[group.name] * (1 - share)) for group in groups} | own

    if target is Target.CHANNELS:
        return left(ratio)
    shares = np.linspace(0, 1, 101)
    return next((kept for kept in map(left, shares) if reached(kept) >= ratio - 1e-9), left(1.0))


def _scores(
    found: Structure, groups: Sequence[Group], context: Context, how: PruningRequest, probe: Probe | None
) -> dict[Group, Scores]:
    if how.importance is Importance.RANDOM:
        return importance.at_random(groups, context.generator())
    if probe is not None and Kind.HEADS in how.kinds:
        # Few enough to be measured one by one.
        return {group: np.array([probe.error({group: [channel]}) for channel in range(group.size)]) for group in groups}
    if how.importance is not Importance.MAGNITUDE:
        try:
            return importance.taylor(found, groups, context, how.samples)
        except StepError as error:
            if probe is None:
                raise
            context.notes.append(f"{how.step}: within each layer magnitude ranks the {how.what}, for {error}")
    return {group: importance.magnitude(found, group, how.norm) for group in groups}


def _harm(
    groups: Sequence[Group], scores: Mapping[Group, Scores], allowed: selection.Allowed, probe: Probe, context: Context
) -> dict[Group, list[tuple[int, float]]]:
    """Measure the error of the outputs when each group alone loses its least important parts."""
    harm = {}
    for number, group in enumerate(groups):
        parts = min(_LEVELS, group.size)
        levels = {allowed(group, group.size * (1 - part / parts)) for part in range(1, parts + 1)} - {group.size}
        harm[group] = [
            (kept, probe.error(selection.lowest({group: scores[group]}, {group: kept})))
            for kept in sorted(levels, reverse=True)
        ]
        context.progress("sensitivity of layers", number + 1, len(groups))
    return harm


def _note_result(
    context: Context,
    how: PruningRequest,
    first: Mapping[str, int],
    left: Mapping[str, int],
    before: tuple[int, int],
    after: tuple[int, int],
) -> None:
    changes = {name: (size, left[name]) for name, size in first.items()}
    gone = sum(size - now for size, now in changes.values())
    figures = context.figures
    key = f"removed_{how.what}"
    figures[key] = figures.get(key, 0) + gone
    for name, one, other in (("parameters", before[0], after[0]), ("macs", before[1], after[1])):
        # Of several steps the first knows how it was, the last how it is.
        figures.setdefault(f"{name}_before", one)
        figures[f"{name}_after"] = other
    if not gone:
        context.notes.append(
            f"{how.step}: removed nothing: a share of {how.ratio:g} is less than what can be cut of any layer at once "
            f"(multiples of {how.limits.multiple}, at least {how.limits.least} left)"
        )
        return
    listed = ", ".join(f"{name} {size} → {now}" for name, (size, now) in changes.items() if now < size)
    context.notes.append(
        f"{how.step}: removed {gone} of {sum(first.values())} {how.what} by {how.importance.value} ({listed}); "
        f"parameters {before[0]:,} → {after[0]:,}, multiply-accumulates for one sample {before[1]:,} → {after[1]:,}"
    )
