"""How alike the answers are to the float model's, where there is no right or wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge.evaluation import groups
from kedge.evaluation.metrics.contract import Metric

Array = npt.NDArray[Any]

_ROWS = 256


class Cosine(Metric):
    """The lowest mean cosine between answers and the float model's, of all outputs and, within each, of all groups of
    channels whose ranges are alike (:func:`kedge.evaluation.groups.of`): boxes do not hide scores.

    What is one number for each sample has no angle; in its place stands one minus half the square error over the float
    model's variance, which a cosine is too where both are small.
    """

    name = "cosine"
    whole = True
    span = None

    def per_sample(self, outputs: Mapping[str, Array], reference: Mapping[str, Array], labels: Any | None) -> Array:
        """N x groups."""
        names = [self.output] if self.output is not None else self._judged(reference)
        columns = [
            cosines(outputs[name], reference[name], group)
            for name in names
            for group in groups.of(reference[name], bounded=self.kinds[name].bounded)
        ]
        count = len(next(iter(reference.values())))
        return np.stack(columns, axis=1) if columns else np.ones((count, 1))

    def aggregate(self, rows: Array) -> float:
        """The lowest of the columns' means; rounded, since sums may differ in their last digits from machine to machine
        and the value goes into a digest."""
        return round(float(np.min(np.mean(rows, axis=0, dtype=np.float64))), 9)

    def _judged(self, reference: Mapping[str, Array]) -> list[str]:
        own = [name for name, seen in self.kinds.items() if self.suits(seen, reference[name], None)]
        return own or [name for name, array in reference.items() if array.dtype.kind == "f" and array.size]


def cosines(output: Array, reference: Array, group: groups.Group) -> Array:
    """N: the cosine of each sample's part of an output, or what stands for it where that is one number.

    Two zero vectors are alike (1); a zero vector and another are not (0), and neither is what is not finite where the
    float model is.
    """
    count = len(reference)
    found = np.empty(count, dtype=np.float64)
    wanted_all = group.of(reference)
    scale = 0.0
    if wanted_all[:1].size == 1:
        scale = 2 * float(np.var(np.asarray(wanted_all, dtype=np.float64)))
    for start in range(0, count, _ROWS):
        wanted = np.asarray(group.of(reference[start : start + _ROWS]), dtype=np.float64)
        wanted = wanted.reshape(len(wanted), -1)
        got = np.asarray(group.of(output[start : start + _ROWS]), dtype=np.float64).reshape(wanted.shape)
        usable = np.isfinite(wanted)
        wanted, got = np.where(usable, wanted, 0.0), np.where(usable, got, 0.0)
        broken = ~np.isfinite(got).all(axis=1)
        got = np.where(np.isfinite(got), got, 0.0)
        part = _numbers(got, wanted, scale) if scale else _angles(got, wanted)
        found[start : start + _ROWS] = np.where(broken, 0.0, part)
    return found


def _numbers(got: Array, wanted: Array, scale: float) -> Array:
    return np.asarray(1.0 - ((got - wanted) ** 2)[:, 0] / scale)


def _angles(got: Array, wanted: Array) -> Array:
    dot = np.einsum("ij,ij->i", got, wanted)
    left, right = np.einsum("ij,ij->i", got, got), np.einsum("ij,ij->i", wanted, wanted)
    product = np.sqrt(left * right)
    both_zero = (left == 0) & (right == 0)
    return np.asarray(np.where(both_zero, 1.0, np.divide(dot, product, out=np.zeros_like(dot), where=product > 0)))


METRICS = (Cosine,)
