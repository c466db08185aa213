"""Structured channel pruning: removes whole channels from every layer that produces, passes on or reads them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from kedge.options import Option
from kedge.pruning.importance import Importance, Norm
from kedge.pruning.selection import Limits, Ranking, Target
from kedge.steps.pruning_step import PruningStep


@dataclass(frozen=True, kw_only=True)
class PruneChannelsOptions:
    """Options of channel pruning."""

    ratio: Annotated[float, Option("Share of the channels to prune, at least 0 and below 1.")] = 0.5
    importance: Annotated[Importance, Option("Importance criterion for channels.")] = Importance.TAYLOR
    ranking: Annotated[Ranking, Option("Whether each layer loses this share, or all layers together.")] = Ranking.LAYER
    target: Annotated[Target, Option("Whether the ratio counts channels or multiply-accumulate operations.")] = (
        Target.CHANNELS
    )
    norm: Annotated[Norm, Option("Norm of a channel's weights, for importance = magnitude.")] = Norm.L2
    layers: Annotated[dict[str, float], Option("Ratios of single layers, by node name.")] = field(default_factory=dict)
    leave: Annotated[tuple[str, ...], Option("Nodes that keep all channels.")] = ()
    multiple_of: Annotated[
        int, Option("The remaining channels are a multiple of this; small layers use a smaller one.")
    ] = 8
    least: Annotated[int, Option("Smallest number of channels that each layer keeps.")] = 4
    most: Annotated[float, Option("Largest share of one layer's channels to prune.")] = 0.9
    rounds: Annotated[int, Option("Number of pruning rounds; importance is measured again in each.")] = 1
    samples: Annotated[int, Option("Largest number of calibration samples for measuring importance.")] = 128

    @property
    def limits(self) -> Limits:
        """The bounds of one layer."""
        return Limits(multiple=self.multiple_of, least=self.least, most=self.most)


class PruneChannels(PruningStep[PruneChannelsOptions]):
    """Prunes the least important channels of convolutions and hidden layers."""

    name: ClassVar[str] = "prune-channels"
    Options = PruneChannelsOptions
    kinds: ClassVar[tuple[str, ...]] = ("channels", "width")
    what: ClassVar[str] = "channels"
