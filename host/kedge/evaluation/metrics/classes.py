"""Right answers: against labels, and against the float model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge.evaluation import decisions
from kedge.evaluation.kinds import IGNORED, ClassifiedOutput, OutputKind, class_numbers, columns, fits
from kedge.evaluation.metrics.contract import Metric
from kedge_protocol.errors import ConfigError, DatasetError

Array = npt.NDArray[Any]

WHERE = "--metric"


class Top1(Metric):
    """Share of samples whose largest score is the label's; of one number, whose side of 0.5 (of 0, where it is no
    probability) is."""

    name = "top1"
    unit = "share"
    needs_labels = True

    @classmethod
    def suits(cls, seen: ClassifiedOutput, reference: Array, labels: Any | None) -> bool:
        """Class scores that the labels fit, one number with labels of 0 and 1, classes that the model gives."""
        return answers_fit(seen, reference, labels)

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
        answers, wanted = answered(self.kinds[name], outputs[name], reference[name], labels)
        return decisions.shares(answers == wanted, wanted != IGNORED)


class Agreement(Metric):
    """Share of samples whose answer is the float model's, right or wrong: the largest of class scores, the side of a
    threshold of a probability (:func:`kedge.evaluation.decisions.threshold`), integers as they are."""

    name = "agreement"
    unit = "share"
    against_float = True

    @classmethod
    def suits(cls, seen: ClassifiedOutput, reference: Array, labels: Any | None) -> bool:
        """Class scores, a probability, and integers."""
        return seen.kind in decisions.ANSWERS or seen.kind is OutputKind.INTEGERS

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


def answers_fit(seen: ClassifiedOutput, reference: Array, labels: Any | None) -> bool:
    """Return whether an output holds answers to labels: class scores that they fit, one number with labels of 0 and 1,
    classes that the model gives."""
    if seen.kind is OutputKind.INTEGERS:
        return isinstance(labels, np.ndarray) and labels.dtype.kind in "iub" and labels.size == reference.size
    if seen.kind in (OutputKind.PROBABILITY, OutputKind.NUMBER):
        return decisions.yes_or_no(labels)
    return seen.kind is OutputKind.CLASSES and fits(reference, labels)


def answered(seen: ClassifiedOutput, output: Array, reference: Array, labels: Any) -> tuple[Array, Array]:
    """Return an output's answers as class numbers, and the labels in their shape.

    Args:
        output: of the candidate, first axis the sample.
        reference: of the float model, which tells where a threshold lies.
    """
    if seen.kind in (OutputKind.PROBABILITY, OutputKind.NUMBER):
        said = decisions.yes(seen, output, reference).astype(np.int64)
    elif seen.kind is OutputKind.INTEGERS:
        said = np.asarray(output)
    else:
        return np.argmax(output, axis=-1), class_numbers(labels, reference)
    return said, np.asarray(labels).reshape(said.shape)


def check_labels(labels: Any, output: Array, *, where: str) -> None:
    """Check labels for top-1.

    Raises:
        DatasetError: not whole numbers, not one for each score vector, or outside the classes.
    """
    labels = class_numbers(labels, output)
    if labels.dtype.kind not in "iu":
        raise DatasetError(f"label has dtype {labels.dtype}, whole numbers were expected", where=where)
    if labels.shape != output.shape[:-1]:
        have, want = ("x".join(map(str, shape)) for shape in (labels.shape, output.shape[:-1]))
        raise DatasetError(f"label has shape {have}, {want} was expected", where=where)
    classes = output.shape[-1]
    counted = labels[labels != IGNORED]
    low, high = int(counted.min(initial=0)), int(counted.max(initial=0))
    if low < 0 or high >= classes:
        raise DatasetError(
            f"label holds {low if low < 0 else high}, the model's {classes} classes are 0 to {classes - 1}", where=where
        )


METRICS = (Top1, Agreement)
