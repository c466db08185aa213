"""Numbers: how far they are from what is right, which is the labels where there are numbers, else the float model's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge.evaluation import decisions
from kedge.evaluation.kinds import ClassifiedOutput, OutputKind
from kedge.evaluation.metrics.contract import Direction, Metric
from kedge_protocol.errors import ConfigError, DatasetError

Array = npt.NDArray[Any]

_DECIBEL = 10.0
_WRONG = float(np.finfo(np.float32).max)
_SILENT = 200.0
"""Decibels that stand for no error at all: beyond what float64 can tell."""


class _Numbers(Metric):
    """What the metrics of this module share: labels, where given, have the output's shape."""

    span = None

    @classmethod
    def suits(cls, seen: ClassifiedOutput, reference: Array, labels: Any | None) -> bool:
        """Numbers; with labels, of their size."""
        if seen.kind in (OutputKind.PASSED_THROUGH, OutputKind.INTEGERS, OutputKind.EMPTY):
            return False
        return labels is None or np.size(labels) == reference.size

    def check(self, reference: Mapping[str, Array], labels: Any | None, *, where: str) -> None:
        """Labels of the output's size."""
        array = reference[self.output or ""]
        if labels is not None and (np.size(labels) != array.size or np.asarray(labels).dtype.kind not in "iufb"):
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

    def per_sample(self, outputs: Mapping[str, Array], reference: Mapping[str, Array], labels: Any | None) -> Array:
        """N x 2: the answer and what is right."""
        return np.concatenate([self.got(outputs), self.wanted(reference, labels)], axis=1)

    def aggregate(self, rows: Array) -> float:
        """Pearson's correlation of the ranks; 0 where one side is constant."""
        left, right = (decisions.mean_ranks(rows[:, column]) for column in (0, 1))
        left, right = left - left.mean(), right - right.mean()
        norm = float(np.sqrt((left**2).sum() * (right**2).sum()))
        return round(float((left * right).sum()) / norm, 9) if norm else 0.0


class Sqnr(Metric):
    """Signal to quantization noise ratio against the float model: 10 log10 of the power of its answers over that of the
    error, in decibels. 20 dB is an error of a tenth, 40 dB of a hundredth. Labels play no part."""

    name = "sqnr"
    unit = "dB"
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


METRICS = (Mae, Mse, Spearman, Sqnr)
