"""Self-distillation: the graph learns from the float model it came from, on the unlabelled calibration samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, TypeAlias

from kedge.options import Option
from kedge.step import Context, Step

if TYPE_CHECKING:
    import onnx

Steps: TypeAlias = Annotated[int, Option("Updates of the weights at most.")]
Batch: TypeAlias = Annotated[int, Option("Samples for one update.")]
Patience: TypeAlias = Annotated[
    int, Option("Judgements, of 24 in all, without an improvement before it goes to the end of its course.")
]


@dataclass(frozen=True, kw_only=True)
class DistilOptions:
    """How a graph is trained; the defaults are for a few dozen to a few thousand samples."""

    steps: Steps = 600
    learning_rate: Annotated[
        float | None, Option("At the top of its course; by the kind of network where you give none.")
    ] = None
    temperature: Annotated[float, Option("Of the soft labels; higher tells more of the wrong classes.")] = 4.0
    hard_weight: Annotated[
        float | None,
        Option("Share of the true labels (or of your own loss) in the loss; 0.3 with labels, 1 with your own loss."),
    ] = None
    attention_weight: Annotated[float, Option("Weight of the attention maps of a transformer.")] = 0.0
    feature_weight: Annotated[
        float | None,
        Option("Weight of the tensors between the blocks; by output and samples where you give none."),
    ] = None
    batch: Batch = 16
    patience: Patience = 8
    held_back: Annotated[float, Option("Share of the samples that judge and are not learnt from.")] = 0.2
    weight_decay: Annotated[float, Option("Pull of the weights towards zero.")] = 0.0
    mixup: Annotated[bool, Option("Blend samples with one another; not where labels or a loss are used.")] = False
    shift: Annotated[bool, Option("Move pictures by up to an eighth of their size.")] = False


class Distil(Step[DistilOptions]):
    """The default repair after pruning or quantization to few bits."""

    name: ClassVar[str] = "distil"
    Options = DistilOptions

    def apply(self, model: onnx.ModelProto, context: Context) -> onnx.ModelProto:
        """See :class:`kedge.step.Step`. The result is never worse on the samples held back than what came
        in.

        Raises:
            StepError: an operator that cannot be trained.
            DivergedError: see :func:`kedge.training.loop.train`.
            DatasetError, ConfigError: labels, samples or options that do not fit.
        """
        from kedge.training import repair

        repair.check(self.options, self.name)
        return repair.trained(model, context, self.options, what=self.name).written()
