"""The contract of a metric that ``--metric KIND[:OUTPUT]`` names.

A metric is a class in a module of :mod:`kedge.evaluation.metrics`, listed there. It judges one output of the model
against the labels, or against the float model's answers where it needs no labels.
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from kedge.evaluation.kinds import ClassifiedOutput, OutputKind

Array = npt.NDArray[Any]


class Direction(str, enum.Enum):
    """Which way is better."""

    HIGHER = "higher"
    LOWER = "lower"


class Metric(abc.ABC):
    """One metric of one output.

    Args:
        output: the output that is judged; None where there is only the whole model to judge (see :attr:`whole`).
        kinds: what each output of the model is, by name, in the model's order.
        inputs: shape of each input's raw samples, by name, first axis the sample.

    Attributes:
        name: as ``--metric`` and the report have it.
        unit: of the value; empty for a plain number.
        direction: a drop is always "worse than float", whichever way is better.
        needs_labels: whether the evaluation set must have labels.
        whole: whether it judges all outputs together, so that none can be named.
        against_float: whether the float model's answers are what is right, whatever labels there are.
        span: the largest amount by which one sample's value may change; None where nothing bounds it. What no sample
            shows may still happen to one in N: see :func:`kedge.evaluation.confidence_intervals.interval`.
    """

    name: ClassVar[str]
    unit: ClassVar[str] = ""
    direction: ClassVar[Direction] = Direction.HIGHER
    needs_labels: ClassVar[bool] = False
    whole: ClassVar[bool] = False
    against_float: ClassVar[bool] = False
    span: ClassVar[float | None] = 1.0

    def __init__(
        self,
        output: str | None,
        kinds: Mapping[str, ClassifiedOutput],
        inputs: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self.output = output
        self.kinds = kinds
        self.inputs = inputs or {}

    @classmethod
    def suits(cls, seen: ClassifiedOutput, reference: Array, labels: Any | None) -> bool:
        """Whether an output is one that this metric judges, where the user names none. By default every output of
        floating-point numbers that is not an input passed through.

        Args:
            reference: the float model's answers, first axis the sample.
            labels: of the evaluation set, as the user gave them.
        """
        return seen.kind not in (OutputKind.PASSED_THROUGH, OutputKind.INTEGERS, OutputKind.EMPTY)

    def check(self, reference: Mapping[str, Array], labels: Any | None, *, where: str) -> None:
        """Check outputs and labels once, before anything is measured.

        Args:
            where: the data set, for messages.

        Raises:
            DatasetError: labels that do not fit.
            ConfigError: an output that this metric cannot judge.
        """

    @abc.abstractmethod
    def per_sample(
        self, outputs: Mapping[str, Array], reference: Mapping[str, Array], labels: Any | None
    ) -> Array | None:
        """What each sample contributes: first axis the sample, real numbers (N, or N x what :meth:`aggregate` needs).

        Intervals and cross-fitting take rows of it again and again, without the model. None for a metric that has
        no such form; it must then override :meth:`value`, which is called on picked samples instead (slow).

        Args:
            outputs: output name → answers to be judged, first axis the sample.
            reference: of the float model, likewise.
            labels: as the user gave them.
        """

    def aggregate(self, rows: Array) -> float:
        """The value over some rows of :meth:`per_sample`; their mean by default."""
        return float(np.mean(rows, dtype=np.float64))

    def value(self, outputs: Mapping[str, Array], reference: Mapping[str, Array], labels: Any | None) -> float:
        """The value over all samples."""
        rows = self.per_sample(outputs, reference, labels)
        if rows is None:
            raise NotImplementedError(f"{type(self).__name__} has neither per_sample nor value")
        return self.aggregate(rows)
