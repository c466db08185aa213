"""Quantization-aware fine-tuning: the graph learns, in the very numbers that the plan gives it, to answer as the float
model did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from kedge.compression.step import Context, Step
from kedge.options import Option

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True, kw_only=True)
class FineTuneOptions:
    """How it is trained; see :class:`kedge.compression.steps.distil.DistilOptions`."""

    steps: Annotated[int, Option("Updates of the weights at most.")] = 800
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
    batch: Annotated[int, Option("Samples for one update.")] = 32
    patience: Annotated[int, Option("Judgements without an improvement before it stops; there are 24 in all.")] = 10
    held_back: Annotated[float, Option("Share of the samples that judge and are not learnt from.")] = 0.2
    weight_decay: Annotated[float, Option("Pull of the weights towards zero.")] = 0.0
    mixup: Annotated[bool, Option("Blend samples with one another; not where labels or a loss are used.")] = False
    shift: Annotated[bool, Option("Move pictures by up to an eighth of their size.")] = False


class FineTune(Step[FineTuneOptions]):
    """Training in the plan's precision: any bit width, layer by layer, integers or stored weights."""

    name: ClassVar[str] = "fine-tune"
    Options = FineTuneOptions

    def apply(self, model: onnx.ModelProto, context: Context) -> onnx.ModelProto:
        """See :class:`kedge.compression.step.Step`.

        A plan of programmable logic (family ``fabric``) gives a QONNX graph: its ``Quant`` nodes are part of what was
        learnt. So does a graph that had such nodes before. Otherwise the result is a float graph, and the ranges that
        its activations learnt are in the context.

        Raises:
            StepError: an operator that cannot be trained, or a tensor that cannot be quantized.
            DivergedError: see :func:`kedge.compression.training.loop.train`.
            DatasetError, ConfigError: labels, samples or options that do not fit.
        """
        from kedge.compression.training import repair, simulation

        repair.check(self.options, self.name)
        start = simulation.simulated(model, context)
        if not start.quantized:
            context.notes.append(f"{self.name}: the plan quantizes nothing, there was nothing to learn")
            return model
        rate = simulation.usual_rate(model, context.plan)
        learnt = repair.trained(
            start.model, context, self.options, what=self.name, hooks=start.hooks, usual_rate=rate
        ).written()
        return learnt if start.stays else simulation.plain(learnt, context)
