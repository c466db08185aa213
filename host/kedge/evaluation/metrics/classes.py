"""Right answers: against labels, and against the float model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge.evaluation import decisions
from kedge.evaluation.kinds import ClassifiedOutput, OutputKind, columns, fits
from kedge.evaluation.metrics.contract import Metric
from kedge_protocol.errors import ConfigError, DatasetError

Array = npt.NDArray[Any]

WHERE = "--metric"


class Top1(Metric):
    """Share of samples whose largest score is the label's; of a probability, whose side of 0.5 is."""

    name = "top1"
    unit = "share"
    needs_labels = True

    @classmethod
    def suits(cls, seen: ClassifiedOutput, reference: Array, labels: Any | None) -> bool:
        """Class scores that the labels fit, a probability with labels of 0 and 1, classes that the model gives."""
        if seen.kind is OutputKind.INTEGERS:
            return isinstance(labels, np.ndarray) and labels.dtype.kind in "iub" and labels.size == reference.size
        return (seen.kind is OutputKind.CLASSES and fits(reference, labels)) or (
            seen.kind is OutputKind.PROBABILITY and _yes_or_no(labels)
        )

    def check(self, reference: Mapping[str, Array], labels: Any | None, *, where: str) -> None:
        """See :func:`check_labels`."""
        name = self.output or ""
        if self.suits(self.kinds[name], reference[name], labels):
            return
        if columns(reference[name]) < 2:
            shape = "x".join(map(str, reference[name].shape))
            raise DatasetError(
                f"there are labels, but output {name!r} of shape {shape} holds no class scores",
                where=where,
                remedy="Give your own --metric file.py:function, or leave the labels out",
            )
        check_labels(labels, reference[name], where=where)

    def per_sample(self, outputs: Mapping[str, Array], reference: Mapping[str, Array], labels: Any | None) -> Array:
        """N: 1 where right, 0 where wrong; with a label for each position the share of them."""
        name = self.output or ""
        if self.kinds[name].kind is OutputKind.PROBABILITY:
            answers = np.asarray(outputs[name]).reshape(len(outputs[name])) > decisions.HALF
            return np.asarray(answers == (np.asarray(labels).reshape(len(answers)) > 0), dtype=np.float64)
        if self.kinds[name].kind is OutputKind.INTEGERS:
            return decisions.shares(np.asarray(outputs[name]) == np.asarray(labels).reshape(outputs[name].shape))
        return decisions.shares(np.argmax(outputs[name], axis=-1) == labels)


class Agreement(Metric):
    """Share of samples whose answer is the float model's, right or wrong: the largest of class scores, the side of a
    threshold of a probability (:func:`kedge.evaluation.decisions.threshold`), integers as they are."""

    name = "agreement"
    unit = "share"

    @classmethod
    def suits(cls, seen: ClassifiedOutput, reference: Array, labels: Any | None) -> bool:
        """Class scores, and a probability."""
        return seen.kind in decisions.ANSWERS

    def check(self, reference: Mapping[str, Array], labels: Any | None, *, where: str) -> None:
        """Raises :class:`ConfigError` where the output has no answers."""
        name = self.output or ""
        if columns(reference[name]) < 2 and self.kinds[name].kind not in (
            OutputKind.PROBABILITY,
            OutputKind.INTEGERS,
        ):
            raise ConfigError(
                f"output {name!r} is {self.kinds[name].kind.value}: it has no answers that could agree", where=WHERE
            )

    def per_sample(self, outputs: Mapping[str, Array], reference: Mapping[str, Array], labels: Any | None) -> Array:
        """N: 1 where the answer is float's, 0 where not; with an answer for each position the share of them."""
        name = self.output or ""
        return decisions.agreeing(self.kinds[name], outputs[name], reference[name])


def check_labels(labels: Any, output: Array, *, where: str) -> None:
    """Check labels for top-1.

    Raises:
        DatasetError: not whole numbers, not one for each score vector, or outside the classes.
    """
    if labels.dtype.kind not in "iu":
        raise DatasetError(f"label has dtype {labels.dtype}, whole numbers were expected", where=where)
    if labels.shape != output.shape[:-1]:
        have, want = ("x".join(map(str, shape)) for shape in (labels.shape, output.shape[:-1]))
        raise DatasetError(f"label has shape {have}, {want} was expected", where=where)
    classes = output.shape[-1]
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise DatasetError(
            f"label holds {low if low < 0 else high}, the model's {classes} classes are 0 to {classes - 1}", where=where
        )


def _yes_or_no(labels: Any | None) -> bool:
    return (
        isinstance(labels, np.ndarray)
        and labels.dtype.kind in "iub"
        and labels[:1].size == 1
        and bool(np.isin(labels, (0, 1)).all())
    )


METRICS = (Top1, Agreement)
