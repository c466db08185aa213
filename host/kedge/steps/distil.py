"""Distillation: trains the graph on the unlabelled calibration samples towards the original float model, or towards a
teacher of another depth or width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from kedge.options import Option
from kedge.step import Context, Step
from kedge.steps.decoder_step import DecoderContext, DecoderStep
from kedge.training.options import TrainingOptions
from kedge_protocol.errors import ConfigError

if TYPE_CHECKING:
    import onnx

    from kedge.training.decoder.weights import HeldDecoder
    from kedge_targets.decoder.spec import DecoderSpec


@dataclass(frozen=True, kw_only=True)
class DistilOptions(TrainingOptions):
    """How the graph is trained, and towards what."""

    teacher: Annotated[
        str | None,
        Option("Another model with the same inputs and outputs: the graph learns from it and is judged against it."),
    ] = None
    layers: Annotated[
        tuple[str, ...],
        Option("Blocks that are compared with a teacher's, STUDENT:TEACHER from 0; the default spreads them evenly."),
    ] = ()


class Distil(Step[DistilOptions], DecoderStep):
    """Trains the graph towards the float model, or another teacher; the default repair after pruning or few-bit
    quantization."""

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
        other, layers = self.options.teacher is not None, self.options.layers
        self._check_layers()
        return repair.trained(model, context, self.options, what=self.name, other=other, layers=layers).written()

    def check_decoder(self, spec: DecoderSpec) -> DecoderSpec:
        """See :class:`kedge.steps.decoder_step.DecoderStep`."""
        from kedge.training import repair

        repair.check(self.options, self.name)
        self._check_layers()
        for name in ("mixup", "shift"):
            if getattr(self.options, name):
                raise ConfigError(f"{name} is not for language models", where=self.name, remedy="Leave it out")
        return spec

    def _check_layers(self) -> None:
        if self.options.layers and self.options.teacher is None:
            raise ConfigError(
                "layers names blocks of a teacher, and none is given", where=self.name, remedy="Give teacher=MODEL too"
            )

    def apply_to_decoder(self, decoder: HeldDecoder, context: DecoderContext) -> HeldDecoder:
        """See :class:`kedge.steps.decoder_step.DecoderStep`. The result is never worse on the sequences held back.

        Raises:
            StepError: the memory does not hold the training.
            DivergedError: see :func:`kedge.training.loop.train`.
            ConfigError: ``layers`` names a layer that there is not.
        """
        from kedge.training import blocks
        from kedge.training.decoder import distillation

        if context.teacher is None or self.options.teacher is None:
            teacher, pairs = context.float_model, list(enumerate(decoder.origins))
        else:
            teacher = context.teacher
            pairs = blocks.pairs(self.options.layers, len(decoder.origins), len(teacher.origins))
        made, outcome = distillation.distilled(
            decoder,
            teacher,
            pairs,
            context.sequences,
            self.options,
            seed=context.seed,
            progress=context.progress,
        )
        context.figures |= {"loss_before": outcome.before, "loss_after": outcome.after, "steps": float(outcome.steps)}
        context.notes += outcome.notes
        if not outcome.after < outcome.before:
            context.notes.append(f"{self.name}: nothing better was found; the model is as it was before")
        return made
