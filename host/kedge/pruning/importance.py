"""Scores the importance of each channel of a group; a higher score is more important."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge.pruning.groups import Group, Structure
from kedge_protocol.errors import ConfigError, StepError

if TYPE_CHECKING:
    import torch

    from kedge.step import Context

Scores = npt.NDArray[np.float64]
Array = npt.NDArray[Any]


class Importance(enum.Enum):
    """The criterion that ranks channels."""

    MAGNITUDE = "magnitude"  # the weights that make, read and scale a channel
    TAYLOR = "taylor"  # what the answers would change by without it, to first order
    MEASURED = "measured"  # how far each group's answers really go wrong decides how much of it goes
    RANDOM = "random"  # nothing: the control that every other must beat


BY_DECODERS = (Importance.TAYLOR, Importance.MAGNITUDE, Importance.RANDOM)
"""The criteria for language models."""


class Norm(enum.Enum):
    """The norm taken of a channel's weights."""

    L1 = "l1"
    L2 = "l2"


_BATCH = 8
_PROJECTIONS = 4
"""Random directions per batch along which the change of the outputs is measured."""


def magnitude(structure: Structure, group: Group, norm: Norm) -> Scores:
    """Score each channel by the norm of all its weights, each weight tensor divided by its mean over the channels (the
    grouped norm of Fang et al., "DepGraph: Towards any structural pruning", CVPR 2023). Scores are comparable between
    layers, whatever their scales."""
    total: Scores = np.zeros(group.size)
    places = {*group.producing, *group.consuming, *group.scaling}
    for place in sorted(places):
        weight = structure.weight(place)
        flat = np.abs(weight.reshape(len(weight), -1).astype(np.float64))
        rows = flat.sum(axis=1) if norm is Norm.L1 else np.square(flat).sum(axis=1)
        found = np.array([rows[indices].sum() for indices in group.members[place]])
        if norm is Norm.L2:
            found = np.sqrt(found)
        total += found / max(float(found.mean()), np.finfo(np.float64).tiny)
    return total / max(1, len(places))


def at_random(groups: Sequence[Group], random: np.random.Generator) -> dict[Group, Scores]:
    """Score the channels at random."""
    return {group: random.random(group.size) for group in groups}


def taylor(structure: Structure, groups: Sequence[Group], context: Context, samples: int) -> dict[Group, Scores]:
    """Score each channel by what it contributes to the outputs, to first order: the squared gradient with respect to a
    factor on the channel where it is read (Molchanov et al., "Importance estimation for neural network pruning", CVPR
    2019; on heads: Michel et al., "Are sixteen heads really better than one?", NeurIPS 2019).

    With labels it is the gradient of the cross entropy. Without labels, the distance to the model's own outputs has no
    gradient at those outputs, so the expected squared change of the outputs themselves is used, estimated along random
    directions (each with independent signs, so that samples of a batch do not mix).

    Raises:
        StepError: torch cannot compute the graph; the error names the node.
        ConfigError: the labels fit no output.
    """
    import torch

    from kedge.training import losses
    from kedge.training.network import Network

    network = Network(structure.model)
    answered = {name: value.numpy() for name, value in _first_answers(network, context).items()}
    heads = losses.heads(structure.model, answered)
    if not heads:
        raise StepError(
            "the model has no output of floats to take gradients of", remedy="Take importance = 'magnitude'"
        )
    wanted = {name for group in groups for name, _ in (*group.consuming, *group.producing) if name in network.roles}
    weights = {name: network.weight(name) for name in sorted(wanted)}
    if not weights:
        raise StepError("no weight of the groups has a gradient", remedy="Take importance = 'magnitude'")
    generator = torch.Generator().manual_seed(context.seed)
    total = {group: np.zeros(group.size) for group in groups}
    count = done = 0
    keep = [head.tensor for head in heads]
    run = network.each if context.fixed_batch else network
    limit = min(samples, context.samples.samples)
    for batch in context.samples.batches(_BATCH):
        rows = min(len(next(iter(batch.values()))), limit - done)
        if rows <= 0:
            break
        feeds = {name: torch.from_numpy(np.ascontiguousarray(array[:rows])) for name, array in batch.items()}
        answers = run(feeds, keep)
        rounds = 1 if context.labels is not None else _PROJECTIONS
        for number in range(rounds):
            if context.labels is None:
                loss = sum(_projected(answers[name], generator) for name in keep)
            else:
                labels = torch.from_numpy(np.asarray(context.labels[done : done + rows]))
                loss = _entropy(heads, answers, labels)
            found = _slopes_by_weights(loss, weights, again=number + 1 < rounds)
            for group in groups:
                total[group] += _gates(group, found) ** 2
            count += 1
        done += rows
        context.progress("importance", done, limit)
    return {group: scores / max(1, count) for group, scores in total.items()}


def _slopes_by_weights(loss: Any, weights: Mapping[str, Any], *, again: bool) -> dict[str, Array | None]:
    """Return the gradient of each weight times the weight; None if the loss does not depend on it."""
    import torch

    slopes = torch.autograd.grad(loss, list(weights.values()), retain_graph=again, allow_unused=True)
    return {
        name: None if slope is None else (slope * weight).detach().numpy()
        for (name, weight), slope in zip(weights.items(), slopes, strict=True)
    }


def _first_answers(network: Any, context: Context) -> dict[str, torch.Tensor]:
    import torch

    feeds = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in next(context.samples.batches(1)).items()}
    with torch.no_grad():
        answers: dict[str, torch.Tensor] = (network.each if context.fixed_batch else network)(feeds)
    return answers


def _projected(answers: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    import torch

    signs = torch.randint(0, 2, answers.shape, generator=generator, dtype=answers.dtype) * 2 - 1
    # In proportion to the size of the answers, so that several outputs can be added.
    return (answers * signs).sum() / answers.detach().square().mean().sqrt().clamp_min(1e-12)


def _entropy(heads: Any, answers: Mapping[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    from torch.nn import functional

    from kedge.training import losses

    fitting = [head for head in heads if head.kind is not losses.Kind.VALUES]
    if not fitting:
        raise ConfigError(
            "labels are given, but no output holds class scores",
            remedy="Leave the labels out: the importance is found from the answers alone",
        )
    return functional.cross_entropy(losses.logits(fitting[0], answers[fitting[0].tensor]), labels.long())


def _gates(group: Group, found: Mapping[str, Array | None]) -> Scores:
    """Return the gradients with respect to a factor on each channel: weight times gradient, summed over all weights
    that read the channel, or over those that produce it if none reads it."""
    total: Scores = np.zeros(group.size)
    places = [place for place in group.consuming if found.get(place[0]) is not None]
    for name, axis in places or [place for place in group.producing if found.get(place[0]) is not None]:
        value = found[name]
        if value is not None:
            rows = np.moveaxis(value, axis, 0).reshape(value.shape[axis], -1).sum(axis=1, dtype=np.float64)
            total += np.array([rows[indices].sum() for indices in group.members[name, axis]])
    return total
