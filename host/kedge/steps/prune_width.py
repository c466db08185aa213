"""Feed-forward width pruning: reduces the inner dimension between two matrix products, as in transformers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar

from kedge.options import Option
from kedge.pruning.importance import Importance, Norm
from kedge.pruning.selection import Limits, Ranking
from kedge.step import Context, Step

if TYPE_CHECKING:
    import onnx


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


class PruneWidth(Step[PruneWidthOptions]):
    """Prunes the least important units between two matrix products."""

    name: ClassVar[str] = "prune-width"
    Options = PruneWidthOptions

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
                kinds=(Kind.WIDTH,),
                what="width",
                ratio=options.ratio,
                importance=options.importance,
                ranking=options.ranking,
                norm=options.norm,
                layers=options.layers,
                leave=options.leave,
                limits=Limits(multiple=options.multiple_of, most=options.most),
                samples=options.samples,
            ),
        )
