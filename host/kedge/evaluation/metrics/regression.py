"""Numbers: how far they are from what is right, which is the labels where there are numbers, else the float model's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge.evaluation import decisions
from kedge.evaluation.kinds import ClassifiedOutput, OutputKind, long_axes
from kedge.evaluation.metrics.contract import Direction, Metric
from kedge_protocol.errors import ConfigError, DatasetError

Array = npt.NDArray[Any]

_DECIBEL = 10.0
_WRONG = float(np.finfo(np.float32).max)
_SILENT = 200.0
"""Decibels that stand for no error at all: beyond what float64 can tell."""


class _Numbers(Metric):
    """What metrics of numbers share: labels, where given, have the output's shape (axes of length one aside)."""

    span = None

    @classmethod
    def suits(cls, seen: ClassifiedOutput, reference: Array, labels: Any | None) -> bool:
        """Numbers; with labels, of their size."""
        if seen.kind in (OutputKind.PASSED_THROUGH, OutputKind.INTEGERS, OutputKind.EMPTY):
            return False
        return labels is None or _are_of(labels, reference)

    def check(self, reference: Mapping[str, Array], labels: Any | None, *, where: str) -> None:
        """Labels of the output's shape."""
        array = reference[self.output or ""]
        if labels is not None and not _are_of(labels, array):
            have, want = ("x".join(map(str, shape)) for shape in (np.shape(labels), array.shape))
            raise DatasetError(f"label has shape {have}, numbers of shape {want} were expected", where=where)

    def wanted(self, reference: Mapping[str, Array], labels: Any | None) -> Array:
        """N x numbers: what is right."""
        array = np.asarray(reference[self.output or ""] if labels is None else labels, dtype=np.float64)
        return array.reshape(len(array), -1)

    def got(self, outputs: Mapping[str, Array]) -> Array:
        """N x numbers: the answers; what is not finite is infinitely wrong."""
        array = np.asarray(outputs[self.output or ""], dtype=np.float64)
        return np.nan_to_num(array.reshape(len(array), -1), nan=_WRONG)


class Mae(_Numbers):
    """Mean absolute error."""

    name = "mae"
    direction = Direction.LOWER

    def per_sample(self, outputs: Mapping[str, Array], reference: Mapping[str, Array], labels: Any | None) -> Array:
        """N: mean over the sample's numbers."""
        error: Array = np.abs(self.got(outputs) - self.wanted(reference, labels)).mean(axis=1)
        return error


class Mse(_Numbers):
    """Mean square error."""

    name = "mse"
    direction = Direction.LOWER

    def per_sample(self, outputs: Mapping[str, Array], reference: Mapping[str, Array], labels: Any | None) -> Array:
        """N: mean over the sample's numbers."""
        error: Array = ((self.got(outputs) - self.wanted(reference, labels)) ** 2).mean(axis=1)
        return error


class Spearman(_Numbers):
    """Spearman's rank correlation of one number for each sample with what is right: whether the order is kept."""

    name = "spearman"

    @classmethod
    def suits(cls, seen: ClassifiedOutput, reference: Array, labels: Any | None) -> bool:
        """One number for each sample."""
        return seen.kind in (OutputKind.NUMBER, OutputKind.PROBABILITY) and super().suits(seen, reference, labels)

    def check(self, reference: Mapping[str, Array], labels: Any | None, *, where: str) -> None:
        """One number for each sample."""
        if reference[self.output or ""][:1].size != 1:
            raise ConfigError(
                f"output {self.output!r} is not one number for each sample, so it has no order", where="--metric"
            )
        super().check(reference, labels, where=where)
        _check_varied(labels, self.name, where=where)

    def per_sample(self, outputs: Mapping[str, Array], reference: Mapping[str, Array], labels: Any | None) -> Array:
        """N x 2: the answer and what is right."""
        return np.concatenate([self.got(outputs), self.wanted(reference, labels)], axis=1)

    def aggregate(self, rows: Array) -> float:
        """Pearson's correlation of the ranks; 0 where one side is constant."""
        left, right = (decisions.mean_ranks(rows[:, column]) for column in (0, 1))
        left, right = left - left.mean(), right - right.mean()
        norm = float(np.sqrt((left**2).sum() * (right**2).sum()))
        return round(float((left * right).sum()) / norm, 9) if norm else 0.0


class R2(_Numbers):
    """Coefficient of determination: one minus the square error over the variance of what is right. Of several numbers
    for each sample the mean over them, as scikit-learn has it."""

    name = "r2"

    @classmethod
    def suits(cls, seen: ClassifiedOutput, reference: Array, labels: Any | None) -> bool:
        """One number for each sample, or several with labels of their shape."""
        if seen.kind in (OutputKind.NUMBER, OutputKind.PROBABILITY):
            return super().suits(seen, reference, labels)
        several = seen.kind is OutputKind.VALUES and reference.ndim == 2
        return several and isinstance(labels, np.ndarray) and labels.shape == reference.shape

    def check(self, reference: Mapping[str, Array], labels: Any | None, *, where: str) -> None:
        """Labels of the output's shape, not all alike."""
        super().check(reference, labels, where=where)
        _check_varied(labels, self.name, where=where)

    def per_sample(self, outputs: Mapping[str, Array], reference: Mapping[str, Array], labels: Any | None) -> Array:
        """N x C x 3: square error, right value, its square, of each of C numbers."""
        wanted = self.wanted(reference, labels)
        error = np.asarray(outputs[self.output or ""], dtype=np.float64).reshape(wanted.shape) - wanted
        return np.stack([error**2, wanted, wanted**2], axis=2)

    def aggregate(self, rows: Array) -> float:
        """Mean of 1 - error / variance; 1 without error, where nothing varies 0 with one."""
        means: Array = np.asarray(rows, dtype=np.float64).mean(axis=0)
        return round(float(np.mean([_determined(*map(float, one)) for one in means])), 9)


def _determined(error: float, mean: float, square: float) -> float:
    variance = square - mean**2
    if error == 0 or not np.isfinite(error):
        return 1.0 if error == 0 else -1e9
    return 1 - error / variance if variance > 1e-12 * max(square, 1e-30) else 0.0


class Sqnr(Metric):
    """Signal to quantization noise ratio against the float model: 10 log10 of the power of its answers over that of the
    error, in decibels. 20 dB is an error of a tenth, 40 dB of a hundredth. Labels play no part."""

    name = "sqnr"
    unit = "dB"
    against_float = True
    span = None

    def per_sample(self, outputs: Mapping[str, Array], reference: Mapping[str, Array], labels: Any | None) -> Array:
        """N x 2: power of the signal and of the error."""
        wanted = np.asarray(reference[self.output or ""], dtype=np.float64).reshape(
            len(reference[self.output or ""]), -1
        )
        got = np.asarray(outputs[self.output or ""], dtype=np.float64).reshape(wanted.shape)
        error = np.nan_to_num(got - wanted, nan=_WRONG)
        return np.stack([(wanted**2).sum(axis=1), (error**2).sum(axis=1)], axis=1)

    def aggregate(self, rows: Array) -> float:
        """Decibels; 200 without any error."""
        signal, error = rows.sum(axis=0)
        if error == 0:
            return _SILENT
        return round(min(_SILENT, _DECIBEL * float(np.log10(max(signal, np.finfo(np.float64).tiny) / error))), 6)


def _are_of(labels: Any, output: Array) -> bool:
    """Return whether labels are numbers in an output's shape, axes of length one aside."""
    found = np.asarray(labels)
    numbers = found.dtype.kind in "iufb" and len(found) == len(output)
    return numbers and long_axes(found.shape) == long_axes(output.shape)


def _check_varied(labels: Any | None, name: str, *, where: str) -> None:
    """Check that labels vary from sample to sample; without that a share of their variation says nothing.

    Raises:
        DatasetError: they are all alike.
    """
    if labels is not None and bool((np.asarray(labels) == np.asarray(labels)[:1]).all()):
        raise DatasetError(
            f"all labels are alike, so {name} says nothing",
            where=where,
            remedy="Take --metric mae, or give more samples",
        )


METRICS = (Mae, Mse, R2, Spearman, Sqnr)
