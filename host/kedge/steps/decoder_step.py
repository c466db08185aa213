"""What a step does to a language model: it takes and returns a decoder instead of a graph."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kedge.training.decoder.weights import HeldDecoder
    from kedge_targets.decoder.spec import DecoderSpec


def _nobody(what: str, done: int, total: int) -> None:
    """Progress that nobody hears."""


@dataclass(kw_only=True)
class DecoderContext:
    """What a step may use.

    Attributes:
        float_model: the model as it came.
        teacher: the model that a step names as its teacher; None if none does.
        sequences: tokens of the calibration texts, all of one length; never those of the evaluation.
        seed: of everything random.
        progress: told how far it is: what, done, total.
        notes: what the reader of the report should know; a step appends.
        figures: what the step measured; a step adds.
    """

    float_model: HeldDecoder
    teacher: HeldDecoder | None = None
    sequences: Sequence[Sequence[int]]
    seed: int = 0
    progress: Callable[[str, int, int], None] = _nobody
    notes: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)


class DecoderStep(abc.ABC):
    """A step that works on language models too."""

    @abc.abstractmethod
    def check_decoder(self, spec: DecoderSpec) -> DecoderSpec:
        """Check the options against the model, before any work, and return the model that the next step finds, as far
        as options are checked against it: its layers.

        Raises:
            ConfigError: an option does not fit the model, or a language model.
        """

    @abc.abstractmethod
    def apply_to_decoder(self, decoder: HeldDecoder, context: DecoderContext) -> HeldDecoder:
        """Return a new decoder; the given one is not changed.

        Raises:
            StepError: it cannot do its work on this model.
        """
