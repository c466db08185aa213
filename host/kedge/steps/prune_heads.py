"""Attention head pruning: removes a head's queries, keys and values, and the rows of the output projection that read
it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar

from kedge.options import Option
from kedge.pruning.importance import Importance
from kedge.pruning.selection import Limits, Ranking
from kedge.step import Context, Step

if TYPE_CHECKING:
    import onnx


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


class PruneHeads(Step[PruneHeadsOptions]):
    """Prunes the least important attention heads; layers may keep different numbers of heads."""

    name: ClassVar[str] = "prune-heads"
    Options = PruneHeadsOptions

    def apply(self, model: onnx.ModelProto, context: Context) -> onnx.ModelProto:
        """See :class:`kedge.step.Step`.

        Raises:
            StepError, ConfigError, ModelError: see :func:`kedge.pruning.pruner.prune`.
        """
        from kedge.pruning import pruner
        from kedge.pruning.groups import Kind

        options = self.options
        return pruner.prune(
            model,
            context,
            pruner.PruningRequest(
                step=self.name,
                kinds=(Kind.HEADS,),
                what="heads",
                ratio=options.ratio,
                importance=options.importance,
                ranking=options.ranking,
                layers=options.layers,
                leave=options.leave,
                limits=Limits(least=options.least),
                samples=options.samples,
            ),
        )
