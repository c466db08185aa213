"""Feed-forward width pruning: reduces the inner dimension between two matrix products, as in transformers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar

from kedge.options import Option
from kedge.pruning.importance import Importance, Norm
from kedge.pruning.selection import Limits, Ranking
from kedge.steps.decoder_step import DecoderContext, DecoderStep
from kedge.steps.pruning_step import PruningStep, check_for_decoder

if TYPE_CHECKING:
    from kedge.training.decoder.weights import HeldDecoder
    from kedge_targets.decoder.spec import DecoderSpec


@dataclass(frozen=True, kw_only=True)
class PruneWidthOptions:
    """Options of width pruning."""

    ratio: Annotated[float, Option("Share of the width to prune, at least 0 and below 1.")] = 0.25
    importance: Annotated[Importance, Option("Importance criterion for the inner units.")] = Importance.TAYLOR
    ranking: Annotated[Ranking, Option("Whether each layer loses this share, or all layers together.")] = Ranking.LAYER
    norm: Annotated[Norm, Option("Norm of a unit's weights, for importance = magnitude.")] = Norm.L2
    layers: Annotated[dict[str, float], Option("Ratios of single layers, by node name.")] = field(default_factory=dict)
    leave: Annotated[tuple[str, ...], Option("Nodes that keep their width.")] = ()
    multiple_of: Annotated[
        int, Option("The remaining width is a multiple of this; small layers use a smaller one.")
    ] = 32
    most: Annotated[float, Option("Largest share of one layer's width to prune.")] = 0.9
    samples: Annotated[int, Option("Largest number of calibration samples for measuring importance.")] = 64

    @property
    def limits(self) -> Limits:
        """The bounds of one layer."""
        return Limits(multiple=self.multiple_of, most=self.most)


class PruneWidth(PruningStep[PruneWidthOptions], DecoderStep):
    """Prunes the least important units between two matrix products."""

    name: ClassVar[str] = "prune-width"
    Options = PruneWidthOptions
    kinds: ClassVar[tuple[str, ...]] = ("width",)
    what: ClassVar[str] = "width"

    def check_decoder(self, spec: DecoderSpec) -> DecoderSpec:
        """See :class:`kedge.steps.decoder_step.DecoderStep`."""
        options = self.options
        check_for_decoder(options.ratio, options.importance, (options.layers, options.leave), where=self.name)
        return spec

    def apply_to_decoder(self, decoder: HeldDecoder, context: DecoderContext) -> HeldDecoder:
        """See :class:`kedge.steps.decoder_step.DecoderStep`. Every layer loses the same share."""
        from kedge.pruning.decoder import pruner

        return pruner.prune_width(
            decoder,
            context.sequences[: self.options.samples],
            ratio=self.options.ratio,
            multiple=self.options.multiple_of,
            by=self.options.importance,
            seed=context.seed,
            progress=context.progress,
        )
