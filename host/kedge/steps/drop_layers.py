"""Layer dropping: removes the layers of a language model whose absence changes its answers least."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from kedge.options import Option
from kedge.step import Context, Step
from kedge.steps.decoder_step import DecoderContext, DecoderStep
from kedge_protocol.errors import ConfigError, StepError

if TYPE_CHECKING:
    import onnx

    from kedge.training.decoder.weights import HeldDecoder
    from kedge_targets.decoder.spec import DecoderSpec


@dataclass(frozen=True, kw_only=True)
class DropLayersOptions:
    """Options of layer dropping."""

    count: Annotated[int, Option("Number of layers to drop.")] = 1


class DropLayers(Step[DropLayersOptions], DecoderStep):
    """Drops the layers of a language model that it misses least, measured with each left out."""

    name: ClassVar[str] = "drop-layers"
    Options = DropLayersOptions

    def apply(self, model: onnx.ModelProto, context: Context) -> onnx.ModelProto:
        """Refuse a graph.

        Raises:
            StepError: always.
        """
        raise StepError(
            "works on language models only",
            where=self.name,
            remedy="Give a smaller network and this model as its teacher: --step distil:teacher=MODEL",
        )

    def check_decoder(self, spec: DecoderSpec) -> DecoderSpec:
        """See :class:`kedge.steps.decoder_step.DecoderStep`."""
        layers, count = len(spec.layers), self.options.count
        if not 1 <= count < layers:
            raise ConfigError(
                f"count is {count}, the model has {layers} layers", where=self.name, remedy=f"Give 1 to {layers - 1}"
            )
        return replace(spec, layers=spec.layers[count:])

    def apply_to_decoder(self, decoder: HeldDecoder, context: DecoderContext) -> HeldDecoder:
        """See :class:`kedge.steps.decoder_step.DecoderStep`."""
        from kedge.pruning.decoder import pruner

        made, gone = pruner.drop_layers(decoder, context.sequences, count=self.options.count, progress=context.progress)
        context.notes.append(f"{self.name}: layers {', '.join(map(str, gone))} are gone")
        return made
