"""Quantization-aware fine-tuning: trains the graph, in exactly the precision of the plan, towards the float model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kedge.step import Context, Step
from kedge.training.options import Batch, Patience, Steps, TrainingOptions

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True, kw_only=True)
class FineTuneOptions(TrainingOptions):
    """Options of fine-tuning; few bits need more training."""

    steps: Steps = 800
    batch: Batch = 32
    patience: Patience = 10


class FineTune(Step[FineTuneOptions]):
    """Trains the graph in the plan's precision: any bit width, per layer, with integers or stored weights."""

    name: ClassVar[str] = "fine-tune"
    Options = FineTuneOptions

    def apply(self, model: onnx.ModelProto, context: Context) -> onnx.ModelProto:
        """See :class:`kedge.step.Step`.

        A plan of programmable logic (family ``fabric``) gives a QONNX graph: its ``Quant`` nodes are part of what was
        learnt. So does a graph that had such nodes before. Otherwise the result is a float graph, and the ranges that
        its activations learnt are in the context.

        Raises:
            StepError: an operator that cannot be trained, or a tensor that cannot be quantized.
            DivergedError: see :func:`kedge.training.loop.train`.
            DatasetError, ConfigError: labels, samples or options that do not fit.
        """
        from kedge.training import repair, simulation

        repair.check(self.options, self.name)
        start = simulation.simulate(model, context)
        if not start.quantized:
            context.notes.append(f"{self.name}: the plan quantizes nothing, there was nothing to learn")
            return model
        rate = simulation.usual_rate(model, context.plan)
        learnt = repair.trained(
            start.model, context, self.options, what=self.name, hooks=start.hooks, usual_rate=rate
        ).written()
        return simulation.finish(learnt, start, context)
