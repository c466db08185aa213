"""How much each channel of a group matters: higher matters more."""

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
    """What ranks channels."""

    MAGNITUDE = "magnitude"  # the weights that make, read and scale a channel
    TAYLOR = "taylor"  # what the answers would change by without it, to first order
    MEASURED = "measured"  # how far each group's answers really go wrong decides how much of it goes
    RANDOM = "random"  # nothing: the control that every other must beat


class Norm(enum.Enum):
    """Of the weights of a channel."""

    L1 = "l1"
    L2 = "l2"


_BATCH = 8
_PROJECTIONS = 4
"""Random directions in which the change of the answers is looked at, for each batch."""


def magnitude(structure: Structure, group: Group, norm: Norm) -> Scores:
    """The norm of all weights that belong to a channel, each weight tensor in proportion to its mean over the channels
    (the grouped norm of Fang et al., "DepGraph: Towards any structural pruning", CVPR 2023): comparable from layer to
    layer, whatever their scales."""
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
    """Any order."""
    return {group: random.random(group.size) for group in groups}


def taylor(structure: Structure, groups: Sequence[Group], context: Context, samples: int) -> dict[Group, Scores]:
    """What a channel adds to the answers, to first order: the squared gradient with respect to a factor on the channel
    at its readers (Molchanov et al., "Importance estimation for neural network pruning", CVPR 2019; on heads: Michel
    et al., "Are sixteen heads really better than one?", NeurIPS 2019).

    With labels it is the gradient of the cross entropy. Without, the distance to the model's own answers has no
    gradient at those answers; taken instead is the expected squared change of the answers themselves, by random
    directions in which they are looked at (each with independent signs, so that samples of a batch do not mix).

    Raises:
        StepError: torch cannot compute the graph; names the node.
        ConfigError: labels that fit no output.
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
    """Each weight's gradient times the weight; None where the loss does not depend on it."""
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
    """Gradients with respect to a factor on each channel: weight times gradient, summed up over all weights that read
    it; or that make it, where none does."""
    total: Scores = np.zeros(group.size)
    places = [place for place in group.consuming if found.get(place[0]) is not None]
    for name, axis in places or [place for place in group.producing if found.get(place[0]) is not None]:
        value = found[name]
        if value is not None:
            rows = np.moveaxis(value, axis, 0).reshape(value.shape[axis], -1).sum(axis=1, dtype=np.float64)
            total += np.array([rows[indices].sum() for indices in group.members[name, axis]])
    return total
