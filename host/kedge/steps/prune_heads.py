"""Attention head pruning: removes a head's queries, keys and values, and the rows of the output projection that read
it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar

from kedge.options import Option
from kedge.pruning.importance import Importance
from kedge.pruning.selection import Limits, Ranking
from kedge.steps.decoder_step import DecoderContext, DecoderStep
from kedge.steps.pruning_step import PruningStep, check_for_decoder

if TYPE_CHECKING:
    from kedge.training.decoder.weights import HeldDecoder
    from kedge_targets.decoder.spec import DecoderSpec


@dataclass(frozen=True, kw_only=True)
class PruneHeadsOptions:
    """Options of head pruning."""

    ratio: Annotated[float, Option("Share of the heads to prune, at least 0 and below 1.")] = 0.25
    importance: Annotated[Importance, Option("Importance criterion for heads.")] = Importance.TAYLOR
    ranking: Annotated[Ranking, Option("Whether each layer loses this share, or all layers together.")] = Ranking.GLOBAL
    layers: Annotated[dict[str, float], Option("Ratios of single layers, by the name of the query node.")] = field(
        default_factory=dict
    )
    leave: Annotated[tuple[str, ...], Option("Nodes that keep all heads.")] = ()
    least: Annotated[int, Option("Smallest number of heads that each layer keeps.")] = 1
    samples: Annotated[int, Option("Largest number of calibration samples for measuring importance.")] = 64

    @property
    def limits(self) -> Limits:
        """The bounds of one layer."""
        return Limits(least=self.least)


class PruneHeads(PruningStep[PruneHeadsOptions], DecoderStep):
    """Prunes the least important attention heads; layers may keep different numbers of heads."""

    name: ClassVar[str] = "prune-heads"
    Options = PruneHeadsOptions
    kinds: ClassVar[tuple[str, ...]] = ("heads",)
    what: ClassVar[str] = "heads"

    def check_decoder(self, spec: DecoderSpec) -> DecoderSpec:
        """See :class:`kedge.steps.decoder_step.DecoderStep`."""
        options = self.options
        check_for_decoder(options.ratio, options.importance, (options.layers, options.leave), where=self.name)
        return spec

    def apply_to_decoder(self, decoder: HeldDecoder, context: DecoderContext) -> HeldDecoder:
        """See :class:`kedge.steps.decoder_step.DecoderStep`. Every layer loses the same share."""
        from kedge.pruning.decoder import pruner

        return pruner.prune_heads(
            decoder,
            context.sequences[: self.options.samples],
            ratio=self.options.ratio,
            least=self.options.least,
            by=self.options.importance,
            seed=context.seed,
            progress=context.progress,
        )
