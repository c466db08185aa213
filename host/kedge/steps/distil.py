"""Self-distillation: trains the graph towards the original float model on the unlabelled calibration samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kedge.step import Context, Step
from kedge.training.options import TrainingOptions

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True, kw_only=True)
class DistilOptions(TrainingOptions):
    """How the graph is trained."""


class Distil(Step[DistilOptions]):
    """Trains the graph towards the float model; the default repair after pruning or few-bit quantization."""

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
