"""Distils a decoder: trains what pruning left towards the whole one, on texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kedge.training import loop, losses
from kedge.training.decoder.network import Answers, DecoderNetwork
from kedge.training.decoder.weights import HeldDecoder
from kedge.training.options import TrainingOptions
from kedge_protocol import memory
from kedge_protocol.errors import StepError

Array = npt.NDArray[Any]
Tensor: TypeAlias = torch.Tensor

_TEMPERATURE = 1.0
"""The whole distribution of the next token is to be kept, not its ranking."""
_FEATURES = 1.0
_RATE = 1e-3
_FEWEST_TO_SPLIT = 5
_POSITIONS_AT_ONCE = 4096
_FITTED = 8
"""Sequences that projections are fitted to at first."""
_COPIES, _SHARE = 7, 0.7


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The terms of the loss; see :class:`kedge.training.options.TrainingOptions`."""

    temperature: float
    hard_weight: float
    attention_weight: float
    feature_weight: float


class DecoderDistillation:
    """The objective; see :class:`kedge.training.loop.Objective`.

    The soft loss is the divergence from the teacher's distribution of the next token, the hard loss the cross entropy
    of the token that follows in the text. Where the numbers of heads differ, attention maps are compared by their mean
    over the heads; where the widths differ, the outputs of layers are compared through a matrix that is trained too.

    Args:
        pairs: layers that are compared, the student's and the teacher's.
        sequences: int64 [sequences, positions].
    """

    def __init__(
        self,
        student: DecoderNetwork,
        teacher: DecoderNetwork,
        pairs: Sequence[tuple[int, int]],
        sequences: Array,
        terms: Terms,
        *,
        held_back: float,
        seed: int,
    ) -> None:
        self._student, self._teacher, self._pairs, self._terms = student, teacher, pairs, terms
        self._tokens = torch.from_numpy(sequences)
        count = len(sequences)
        order = np.random.default_rng([seed, 1]).permutation(count)
        judged = max(1, round(count * held_back)) if held_back and count >= _FEWEST_TO_SPLIT else 0
        self._judging: Array = np.sort(order[:judged]) if judged else np.arange(count)
        self.training: Array = np.sort(order[judged:]) if judged else np.arange(count)
        self.projections = self._made_projections() if terms.feature_weight else []
        """From the student's channels to the teacher's for each pair; none where they are as many."""

    def _made_projections(self) -> list[torch.nn.Parameter]:
        """Return matrices that fit best before training, by least squares over a few sequences (Romero et al.,
        "FitNets", 2015)."""
        if self._student.spec.hidden == self._teacher.spec.hidden:
            return []
        with torch.no_grad():
            few = self._tokens[self.training[:_FITTED]]
            ours, theirs = self._student(few).hidden, self._teacher(few).hidden
            solved = [
                torch.linalg.lstsq(ours[a].flatten(0, 1), theirs[b].flatten(0, 1), driver="gelsd").solution
                for a, b in self._pairs
            ]
        return [torch.nn.Parameter(one) for one in solved]

    def loss(self, picked: Array, random: np.random.Generator) -> Tensor:
        """Return the training loss; see :class:`kedge.training.loop.Objective`."""
        return self._loss(self._tokens[picked])

    def judged(self) -> float:
        """Return the held-out loss; see :class:`kedge.training.loop.Objective`."""
        total = 0.0
        each = max(1, _POSITIONS_AT_ONCE // self._tokens.shape[1])
        with torch.no_grad():
            for start in range(0, len(self._judging), each):
                picked = self._judging[start : start + each]
                total += float(self._loss(self._tokens[picked])) * len(picked)
        return total / len(self._judging)

    def _loss(self, tokens: Tensor) -> Tensor:
        terms, maps = self._terms, self._terms.attention_weight > 0
        ours = self._student(tokens, attention=maps)
        with torch.no_grad():
            theirs = self._teacher(tokens, attention=maps)
        total = torch.zeros(())
        if terms.hard_weight < 1:
            soft = losses.soft_labels(ours.logits.flatten(0, 1), theirs.logits.flatten(0, 1), terms.temperature)
            total = total + (1 - terms.hard_weight) * soft
        if terms.hard_weight > 0:
            following = ours.logits[:, :-1].flatten(0, 1)
            total = total + terms.hard_weight * losses.hard_labels(following, tokens[:, 1:].flatten())
        return total + self._inside(ours, theirs)

    def _inside(self, ours: Answers, theirs: Answers) -> Tensor:
        terms, total = self._terms, torch.zeros(())
        for at, (index, other) in enumerate(self._pairs):
            if terms.feature_weight:
                hidden = ours.hidden[index] @ self.projections[at] if self.projections else ours.hidden[index]
                share = terms.feature_weight / len(self._pairs)
                total = total + share * losses.features(hidden, theirs.hidden[other])
            if terms.attention_weight:
                share = terms.attention_weight / len(self._pairs)
                total = total + share * losses.attention(ours.attention[index], theirs.attention[other])
        return total


def distilled(
    student: HeldDecoder,
    teacher: HeldDecoder,
    pairs: Sequence[tuple[int, int]],
    sequences: Sequence[Sequence[int]],
    options: TrainingOptions,
    *,
    seed: int,
    progress: Callable[[str, int, int], None],
) -> tuple[HeldDecoder, loop.Outcome]:
    """Train a decoder and return it in the best state found.

    Args:
        pairs: layers that are compared, the student's and the teacher's.
        sequences: of one length.

    Raises:
        StepError: this machine's memory does not hold the training.
        DivergedError: see :func:`kedge.training.loop.train`.
    """
    _check_memory(student, teacher)
    network, whole = DecoderNetwork(student), DecoderNetwork(teacher)
    whole.requires_grad_(False)
    terms = Terms(
        temperature=_TEMPERATURE if options.temperature is None else options.temperature,
        hard_weight=options.hard_weight or 0.0,
        attention_weight=options.attention_weight,
        feature_weight=_FEATURES if options.feature_weight is None else options.feature_weight,
    )
    objective = DecoderDistillation(
        network, whole, pairs, np.array(sequences, np.int64), terms, held_back=options.held_back, seed=seed
    )
    schedule = loop.Schedule(
        steps=options.steps,
        learning_rate=options.learning_rate or _RATE,
        batch=min(options.batch, len(objective.training)),
        patience=options.patience,
        weight_decay=options.weight_decay,
        seed=seed,
    )
    parameters = [*network.parameters(), *objective.projections]
    outcome = loop.train(parameters, objective, schedule, what="distil", progress=progress)
    return network.written(), outcome


def _check_memory(student: HeldDecoder, teacher: HeldDecoder) -> None:
    """Refuse a training that memory does not hold: weights, gradients, two moments of Adam and the best state so far of
    the student, in float32; the weights of the teacher twice, as they are read and as torch has them."""
    needed = 4 * (_COPIES * student.parameters + 2 * teacher.parameters)
    if needed > _SHARE * memory.physical():
        raise StepError(
            f"training {student.parameters / 1e6:.0f} million weights takes about {needed >> 20} MiB, this machine has "
            f"{memory.physical() >> 20} MiB",
            where="distil",
            remedy="Leave the step out, or compile on a larger machine",
        )
