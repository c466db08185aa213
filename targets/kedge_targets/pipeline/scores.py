"""Turns class scores into probabilities and the best labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.bundle.pipeline import Activation, Scores
from kedge_targets.pipeline.answers import Label

Array = npt.NDArray[Any]


def softmax(logits: Array) -> Array:
    """Return the softmax over the last axis, in float64."""
    shifted = logits.astype(np.float64) - np.max(logits, axis=-1, keepdims=True)
    powers = np.exp(shifted)
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def sigmoid(logits: Array) -> Array:
    """Return ``1 / (1 + exp(-x))`` in float64, without overflow."""
    x = logits.astype(np.float64)
    small = np.exp(-np.abs(x))
    return np.asarray(np.where(x >= 0, 1 / (1 + small), small / (1 + small)))


def activated(values: Array, how: Activation | None) -> Array:
    """Return the probabilities of an output by applying its missing activation."""
    if how is Activation.SOFTMAX:
        return softmax(values)
    return sigmoid(values) if how is Activation.SIGMOID else values.astype(np.float64)


def best(values: Array, how: Scores, labels: Sequence[str]) -> list[Label]:
    """Return the best labels of one sample's scores (any shape; one score per class), best first.

    NaN is not a score; if scores are equal, the lower class comes first.
    """
    scores = activated(values.reshape(-1), how.activation)
    order = np.argsort(-np.where(np.isnan(scores), -np.inf, scores), kind="stable")
    chosen = [int(one) for one in order if scores[one] >= how.threshold][: how.top]
    return [Label(name_of(one, labels), one, float(scores[one])) for one in chosen]


def name_of(index: int, labels: Sequence[str]) -> str:
    """Return a class's name, or its number if it has none."""
    return labels[index] if 0 <= index < len(labels) else str(index)
