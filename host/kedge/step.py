"""The contract of a compression step: a pass over the float graph, ``apply(model) -> model``.

A step is one file with one class, its options one frozen dataclass whose fields are annotated with
:class:`kedge.options.Option`; the recipe's keys are derived from it. Third parties add steps by an entry point of the
group ``kedge.steps``: its name is the step's, its value the class.

Steps run in the worker, in the order of the recipe, before a backend lowers the graph.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from kedge_targets.numerics import Plan, Precision

if TYPE_CHECKING:
    import onnx

__all__ = ["Context", "SampleSet", "Step"]

Array = npt.NDArray[Any]
O = TypeVar("O")  # noqa: E741 -- options


class SampleSet(Protocol):
    """Calibration samples in the form that the model takes: preprocessed, in the input's dtype."""

    @property
    def samples(self) -> int:
        """Number of samples."""

    def batches(self, size: int) -> Iterator[dict[str, Array]]:
        """Yield batches, input name → array of up to ``size`` samples, in the order of the data set. It may be called
        repeatedly."""


def _nobody(what: str, done: int, total: int) -> None:
    """Progress that nobody hears."""


@dataclass(kw_only=True)
class Context:
    """What a step may use: the data, the plan and the folders of one run.

    Attributes:
        teacher: the float model as it came: what the result is held against.
        samples: for calibration and self-distillation; never those of the evaluation.
        labels: of the samples, first axis the sample; None where the user gave none.
        plan: how the result will be lowered: what fine-tuning simulates and bias correction corrects.
        seed: of everything random.
        fixed_batch: whether the graph takes one sample at a time only.
        workdir: an empty folder that outlives the call.
        memo: an existing folder that this step shares with its runs for other plans, over the same graph and with the
            same options, for what does not depend on the plan; None to share nothing. Runs may overlap in time.
        checkpoints: a folder that outlives the whole compilation, for training to go on from; None to keep none.
        loss: the user's own, ``file.py:function``, for training with labels.
        seconds: how long the step may take; None for as long as it likes.
        progress: told how far it is: what, done, total.
        notes: what the reader of the report should know; a step appends.
        figures: what the step measured, name → number; a step adds.
        ranges: tensor name → (low, high) that the step decided for the plan; a step adds.
        layers: node name → precision of a node that the step made, where it is not to be the plan's; a step adds.
    """

    teacher: onnx.ModelProto
    samples: SampleSet
    plan: Plan
    workdir: Path
    seed: int = 0
    labels: Array | None = None
    fixed_batch: bool = False
    memo: Path | None = None
    checkpoints: Path | None = None
    loss: str | None = None
    seconds: float | None = None
    progress: Callable[[str, int, int], None] = _nobody
    notes: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    layers: dict[str, Precision] = field(default_factory=dict)

    def generator(self) -> np.random.Generator:
        """Return a new random generator with the seed."""
        return np.random.default_rng(self.seed)


class Step(abc.ABC, Generic[O]):
    """One step. A new instance is made for each run."""

    name: ClassVar[str]
    """As in a recipe: ``prune-channels``."""
    Options: ClassVar[type[Any]]
    """A frozen dataclass, every field with a default."""

    def __init__(self, options: O) -> None:
        self.options = options

    @abc.abstractmethod
    def apply(self, model: onnx.ModelProto, context: Context) -> onnx.ModelProto:
        """Return a new graph; the given one is not changed. Inputs, outputs and remaining nodes keep their names, so
        that a plan by layer still fits.

        Raises:
            StepError: it cannot do its work on this model; says the node and what to do.
            ConfigError: options that contradict the model or each other.
        """
