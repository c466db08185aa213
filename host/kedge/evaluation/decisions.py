"""Answers: what a program behind the model does with its scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge.evaluation.kinds import ClassifiedOutput, OutputKind
from kedge_protocol.errors import ConfigError

Array = npt.NDArray[Any]

ANSWERS = (OutputKind.CLASSES, OutputKind.PROBABILITY)
"""Kinds of output that hold answers."""
HALF = 0.5
_TOP = 0.9
_RARE = 0.01
_EDGE = 0.02


def threshold(reference: Array) -> float:
    """Where a program would divide the float model's probabilities into yes and no: at 0.5, or where hardly any lies
    on one side of it, at the float model's own highest tenth (within 0.02..0.98)."""
    values = np.asarray(reference, dtype=np.float64).ravel()
    values = values[np.isfinite(values)]
    if not values.size or _RARE <= float(np.mean(values > HALF)) <= 1 - _RARE:
        return HALF
    return float(np.clip(np.quantile(values, _TOP), _EDGE, 1 - _EDGE))


def edge_of(reference: Array) -> float:
    """Where independent scores are divided into yes and no: 0.5 where the float model's are probabilities, 0 where they
    are logits. A compressed model may leave 0..1 a little, so that its own scores do not tell."""
    bounded = float(np.min(reference)) >= 0 and float(np.max(reference)) <= 1
    return HALF if bounded else 0.0


def mean_ranks(values: Array) -> Array:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Array = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return ranks


def agreeing(seen: ClassifiedOutput, output: Array, reference: Array) -> Array:
    """N shares of 0..1: how much of each sample's answers is the float model's."""
    if seen.kind is OutputKind.PROBABILITY:
        edge = threshold(reference)
        return shares((np.asarray(output) > edge) == (np.asarray(reference) > edge))
    if reference.dtype.kind != "f":
        return shares(np.asarray(output) == np.asarray(reference))
    return shares(np.argmax(output, axis=-1) == np.argmax(reference, axis=-1))


def agreement(
    kinds: Mapping[str, ClassifiedOutput], outputs: Mapping[str, Array], reference: Mapping[str, Array]
) -> float | None:
    """Share of samples whose answers are the float model's, of the output where they are least so; None where no output
    has answers."""
    told = [float(np.mean(agreeing(kinds[name], outputs[name], reference[name]))) for name in answering(kinds)]
    return min(told, default=None)


def answering(kinds: Mapping[str, ClassifiedOutput]) -> list[str]:
    """The outputs that have answers: class scores and probabilities; where there are none, integers."""
    named = [name for name, seen in kinds.items() if seen.kind in ANSWERS]
    return named or [name for name, seen in kinds.items() if seen.kind is OutputKind.INTEGERS]


def check_asked(kinds: Mapping[str, ClassifiedOutput]) -> None:
    """Check that there are answers to agree on, where the user asks for it.

    Raises:
        ConfigError: no output has any.
    """
    if not answering(kinds):
        told = "; ".join(f"{name} is {seen.kind.value}, {seen.why}" for name, seen in kinds.items())
        raise ConfigError(
            f"no output has answers that could agree: {told}",
            where="--min-agreement",
            remedy="Leave it out, or say which output has class scores: --metric agreement:OUTPUT",
        )


def shares(right: Any) -> Array:
    """The share of True in each sample, first axis the sample."""
    found: Array = np.asarray(right, dtype=np.float64).reshape(len(right), -1).mean(axis=1)
    return found
