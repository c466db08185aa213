"""Lossless pruning: removes channels that carry nothing."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from kedge.options import Option
from kedge.step import Context, Step

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True, kw_only=True)
class DropDeadChannelsOptions:
    """On what constants are seen."""

    samples: Annotated[int, Option("Calibration samples that channels are watched on.")] = 8


class DropDeadChannels(Step[DropDeadChannelsOptions]):
    """Removes channels that only zero weights produce or read. Every compilation starts with this step if it finds
    any."""

    name: ClassVar[str] = "drop-dead-channels"
    Options = DropDeadChannelsOptions

    def apply(self, model: onnx.ModelProto, context: Context) -> onnx.ModelProto:
        """See :class:`kedge.step.Step`."""
        from kedge.pruning import dead_channels

        samples = list(itertools.islice(context.samples.batches(1), max(1, self.options.samples)))
        dropped = dead_channels.drop(model, samples)
        context.notes.append(dropped.note if dropped.count else "no channel is dead")
        context.figures["dead_channels"] = context.figures.get("dead_channels", 0) + dropped.count
        return dropped.model
