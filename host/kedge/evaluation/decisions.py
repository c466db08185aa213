"""Answers: what an application does with the model's scores."""

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
    """Return the threshold at which an application would turn probabilities into yes and no: 0.5, or, if hardly any lie
    on one side of it, the float model's 90th percentile (within 0.02..0.98)."""
    values = np.asarray(reference, dtype=np.float64).ravel()
    values = values[np.isfinite(values)]
    if not values.size or _RARE <= float(np.mean(values > HALF)) <= 1 - _RARE:
        return HALF
    return float(np.clip(np.quantile(values, _TOP), _EDGE, 1 - _EDGE))


def edge_of(reference: Array) -> float:
    """Return the threshold of independent scores: 0.5 if the float model's are probabilities, 0 if they are logits. The
    compressed model's scores cannot decide this, since they may leave 0..1 a little."""
    bounded = float(np.min(reference)) >= 0 and float(np.max(reference)) <= 1
    return HALF if bounded else 0.0


def yes(seen: ClassifiedOutput, output: Array, reference: Array) -> Array:
    """Return N times whether an output with one number for each sample says yes: a probability above 0.5, another
    number above :func:`edge_of`."""
    edge = HALF if seen.kind is OutputKind.PROBABILITY else edge_of(reference)
    return np.asarray(output).reshape(len(output)) > edge


def yes_or_no(labels: Any | None) -> bool:
    """Return whether labels are a yes (1) or no (0) for each sample."""
    return (
        isinstance(labels, np.ndarray)
        and labels.dtype.kind in "iufb"
        and labels[:1].size == 1
        and bool(np.isin(labels, (0, 1)).all())
    )


def mean_ranks(values: Array) -> Array:
    """Return ranks from 1; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Array = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return ranks


def agreeing(seen: ClassifiedOutput, output: Array, reference: Array) -> Array:
    """Return, for each of N samples, the share (0..1) of its answers that equal the float model's."""
    if seen.kind is OutputKind.PROBABILITY:
        edge = threshold(reference)
        return shares((np.asarray(output) > edge) == (np.asarray(reference) > edge))
    if reference.dtype.kind != "f":
        return shares(np.asarray(output) == np.asarray(reference))
    return shares(np.argmax(output, axis=-1) == np.argmax(reference, axis=-1))


def agreement(
    kinds: Mapping[str, ClassifiedOutput], outputs: Mapping[str, Array], reference: Mapping[str, Array]
) -> float | None:
    """Return the share of samples with the float model's answers, of the output where it is lowest; None if no output
    has answers."""
    told = [float(np.mean(agreeing(kinds[name], outputs[name], reference[name]))) for name in answering(kinds)]
    return min(told, default=None)


def answering(kinds: Mapping[str, ClassifiedOutput]) -> list[str]:
    """Return the outputs that have answers: class scores and probabilities, or integers if there are none of those."""
    named = [name for name, seen in kinds.items() if seen.kind in ANSWERS]
    return named or [name for name, seen in kinds.items() if seen.kind is OutputKind.INTEGERS]


def check_asked(kinds: Mapping[str, ClassifiedOutput]) -> None:
    """Check that there are answers to compare if the user asks for an agreement.

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


def shares(right: Any, counted: Any | None = None) -> Array:
    """Return the share of True in each sample (first axis), of what counts there (all, by default); 1 where nothing
    does."""
    found = np.asarray(right, dtype=np.float64).reshape(len(right), -1)
    if counted is None:
        return np.asarray(found.mean(axis=1))
    used = np.asarray(counted, dtype=np.float64).reshape(found.shape)
    return np.asarray(np.where(used.any(axis=1), (found * used).sum(axis=1) / np.maximum(1, used.sum(axis=1)), 1.0))
