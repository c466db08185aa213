"""The training options shared by the steps ``distil`` and ``fine-tune``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, TypeAlias

from kedge.options import Option

Steps: TypeAlias = Annotated[int, Option("Largest number of weight updates.")]
Batch: TypeAlias = Annotated[int, Option("Samples per update.")]
Patience: TypeAlias = Annotated[
    int, Option("Evaluations (of 24 in all) without an improvement before the learning rate goes to its end.")
]


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Options of training; the defaults are for a few dozen to a few thousand samples."""

    steps: Steps = 600
    learning_rate: Annotated[
        float | None, Option("Peak learning rate; the default depends on the kind of network.")
    ] = None
    temperature: Annotated[
        float | None,
        Option(
            "Temperature of the soft labels; a higher one says more about the wrong classes. The default is 4, and 1 "
            "for language models."
        ),
    ] = None
    hard_weight: Annotated[
        float | None,
        Option(
            "Weight of the true labels, or of your own loss, in the loss; default 0.3 with labels, 1 with your own."
        ),
    ] = None
    attention_weight: Annotated[float, Option("Weight of the attention maps of a transformer.")] = 0.0
    feature_weight: Annotated[
        float | None,
        Option("Weight of the tensors between the blocks; the default depends on the outputs and the samples."),
    ] = None
    batch: Batch = 16
    patience: Patience = 8
    held_back: Annotated[float, Option("Share of the samples held out for evaluation; they are not trained on.")] = 0.2
    weight_decay: Annotated[float, Option("Weight decay.")] = 0.0
    mixup: Annotated[bool, Option("Blend pairs of samples; cannot be combined with labels or a loss.")] = False
    shift: Annotated[bool, Option("Shift pictures by up to an eighth of their size.")] = False
