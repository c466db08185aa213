"""Classification beyond top-1: the best five, F1, several labels for each sample, and the area under the ROC curve."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge.evaluation import decisions
from kedge.evaluation.kinds import IGNORED, ClassifiedOutput, OutputKind, class_numbers, columns, fits
from kedge.evaluation.metrics.classes import answered, answers_fit, check_labels
from kedge.evaluation.metrics.contract import Metric
from kedge_protocol.errors import DatasetError

Array = npt.NDArray[Any]

_FIVE = 5


class Top5(Metric):
    """Share of samples whose label is among the five largest scores."""

    name = "top5"
    unit = "share"
    needs_labels = True

    @classmethod
    def suits(cls, seen: ClassifiedOutput, reference: Array, labels: Any | None) -> bool:
        """Class scores that the labels fit."""
        return seen.kind is OutputKind.CLASSES and fits(reference, labels)

    def check(self, reference: Mapping[str, Array], labels: Any | None, *, where: str) -> None:
        """Labels as for top-1, and more than five classes: with fewer nothing could be wrong."""
        array = reference[self.output or ""]
        check_labels(labels, array, where=where)
        if columns(array) <= _FIVE:
            raise DatasetError(
                f"output {self.output!r} has {columns(array)} classes, so the best five always hold the label",
                where=where,
                remedy="Take --metric top1 or f1",
            )

    def per_sample(self, outputs: Mapping[str, Array], reference: Mapping[str, Array], labels: Any | None) -> Array:
        """N: 1 where the label is among the best five; with a label for each position the share of them."""
        scores = np.nan_to_num(np.asarray(outputs[self.output or ""], dtype=np.float64), nan=-np.inf)
        best = np.argpartition(-scores, _FIVE - 1, axis=-1)[..., :_FIVE]
        wanted = class_numbers(labels, scores)
        return decisions.shares((best == wanted[..., None]).any(axis=-1), wanted != IGNORED)


class F1(Metric):
    """Mean over the classes of F1, the harmonic mean of precision and recall (macro average); of one number for each
    sample, over no and yes. Classes that neither labels nor answers name do not count."""

    name = "f1"
    needs_labels = True

    @classmethod
    def suits(cls, seen: ClassifiedOutput, reference: Array, labels: Any | None) -> bool:
        """Class scores that the labels fit, one number with labels of 0 and 1, classes that the model gives."""
        return answers_fit(seen, reference, labels)

    def check(self, reference: Mapping[str, Array], labels: Any | None, *, where: str) -> None:
        """Labels as for top-1."""
        name = self.output or ""
        if not answers_fit(self.kinds[name], reference[name], labels):
            check_labels(labels, reference[name], where=where)

    def per_sample(self, outputs: Mapping[str, Array], reference: Mapping[str, Array], labels: Any | None) -> Array:
        """N x positions x 2: label and answer."""
        name = self.output or ""
        answers, wanted = answered(self.kinds[name], outputs[name], reference[name], labels)
        return np.stack([wanted.reshape(len(wanted), -1), answers.reshape(len(wanted), -1)], axis=2)

    def aggregate(self, rows: Array) -> float:
        """The macro average."""
        wanted, answers = rows[rows[..., 0] != IGNORED].T
        classes = np.union1d(wanted, answers)
        hits = np.asarray([np.sum((wanted == one) & (answers == one)) for one in classes])
        total = np.asarray([np.sum(wanted == one) + np.sum(answers == one) for one in classes])
        return float(np.mean(2 * hits / total))


class MultilabelF1(Metric):
    """F1 over all decisions of all classes (micro average), for samples that may have several labels: a multi-hot
    matrix. A class is an answer where its probability is above 0.5, or its logit above 0."""

    name = "multilabel-f1"
    needs_labels = True

    @classmethod
    def suits(cls, seen: ClassifiedOutput, reference: Array, labels: Any | None) -> bool:
        """An output of the labels' shape, with several columns."""
        return isinstance(labels, np.ndarray) and labels.shape == reference.shape and columns(reference) > 1

    def check(self, reference: Mapping[str, Array], labels: Any | None, *, where: str) -> None:
        """Labels of 0 and 1 in the output's shape."""
        check_multi_hot(labels, reference[self.output or ""], where=where)

    def per_sample(self, outputs: Mapping[str, Array], reference: Mapping[str, Array], labels: Any | None) -> Array:
        """N x 2: right answers, and labels and answers together."""
        name = self.output or ""
        answers = np.asarray(outputs[name]) > decisions.edge_of(reference[name])
        wanted = np.asarray(labels) > 0
        flat = (len(wanted), -1)
        hits = (answers & wanted).reshape(flat).sum(axis=1)
        total = answers.reshape(flat).sum(axis=1) + wanted.reshape(flat).sum(axis=1)
        return np.stack([hits, total], axis=1).astype(np.float64)

    def aggregate(self, rows: Array) -> float:
        """2 * right / (labels + answers); 1 where there are neither."""
        hits, total = rows.sum(axis=0)
        return float(2 * hits / total) if total else 1.0


class Auc(Metric):
    """Area under the ROC curve: how likely a sample of a class scores higher than one of another class (Hanley and
    McNeil, 1982); equal scores count half. With several columns, the mean over the columns, each against the rest."""

    name = "auc"
    needs_labels = True

    @classmethod
    def suits(cls, seen: ClassifiedOutput, reference: Array, labels: Any | None) -> bool:
        """A number for each sample with labels of 0 and 1, class scores that the labels fit, or multi-hot labels."""
        if seen.kind in (OutputKind.PROBABILITY, OutputKind.NUMBER):
            return decisions.yes_or_no(labels)
        return fits(reference, labels) or MultilabelF1.suits(seen, reference, labels)

    def check(self, reference: Mapping[str, Array], labels: Any | None, *, where: str) -> None:
        """Labels of at least two kinds, that fit."""
        array, wanted = reference[self.output or ""], np.asarray(labels)
        if array[:1].size == 1:
            check_multi_hot(wanted.reshape(len(wanted)), array.reshape(len(array)), where=where)
        elif wanted.shape == array.shape:
            check_multi_hot(wanted, array, where=where)
        else:
            check_labels(wanted, array, where=where)
        if len(np.unique(wanted)) < 2:
            raise DatasetError("all labels are alike, so there is no ROC curve", where=where)

    def per_sample(self, outputs: Mapping[str, Array], reference: Mapping[str, Array], labels: Any | None) -> Array:
        """N x columns x 2: score, and 1 where the sample is of the column's class."""
        scores = np.asarray(outputs[self.output or ""], dtype=np.float64)
        scores = scores.reshape(len(scores), -1)
        wanted = np.asarray(labels)
        width = scores.shape[1]
        if wanted.size == scores.size:
            positive = wanted.reshape(scores.shape) > 0
        else:
            positive = class_numbers(wanted, scores).reshape(len(wanted), 1) == np.arange(width)
        if width == 2:  # the two columns say the same
            scores, positive = scores[:, 1:], positive[:, 1:]
        return np.stack([scores, positive.astype(np.float64)], axis=2)

    def aggregate(self, rows: Array) -> float:
        """The mean of the columns that have samples of both kinds; 0.5 (chance) where none has, or for NaN."""
        areas = [area for one in range(rows.shape[1]) if (area := _area(rows[:, one, 0], rows[:, one, 1])) is not None]
        return float(np.mean(areas)) if areas else decisions.HALF


def _area(scores: Array, positive: Array) -> float | None:
    yes = positive > 0
    ahead, behind = int(yes.sum()), int((~yes).sum())
    if not ahead or not behind:
        return None
    if not np.isfinite(scores).all():
        return decisions.HALF
    ranks = decisions.mean_ranks(scores)  # of the Mann-Whitney statistic
    return float((ranks[yes].sum() - ahead * (ahead + 1) / 2) / (ahead * behind))


def check_multi_hot(labels: Any, output: Array, *, where: str) -> None:
    """Check labels of 0 and 1 in the output's shape.

    Raises:
        DatasetError: other numbers, or another shape.
    """
    wanted = np.asarray(labels)
    if wanted.shape != output.shape:
        have, want = ("x".join(map(str, shape)) for shape in (wanted.shape, output.shape))
        raise DatasetError(f"label has shape {have}, {want} was expected", where=where)
    if wanted.dtype.kind not in "iubf" or not np.isin(wanted, (0, 1)).all():
        raise DatasetError("label holds other numbers than 0 and 1", where=where)


METRICS = (Top5, F1, MultilabelF1, Auc)
