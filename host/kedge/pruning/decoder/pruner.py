"""Prunes a decoder by measured importance; every layer loses the same number, so that one graph fits all."""

from __future__ import annotations

import math
from collections.abc import Callable

from kedge.pruning.decoder import cuts, importance
from kedge.pruning.decoder.importance import Sequences
from kedge.pruning.importance import Importance
from kedge.training.decoder.weights import HeldDecoder

Progress = Callable[[str, int, int], None]

_LAYER_SEQUENCES = 8
"""Sequences on which every layer is left out in turn."""


def prune_width(
    decoder: HeldDecoder,
    sequences: Sequences,
    *,
    ratio: float,
    multiple: int,
    by: Importance,
    seed: int,
    progress: Progress,
) -> HeldDecoder:
    """Return the decoder without a share of its feed-forward units.

    Args:
        multiple: of the width that stays, as far as the width that there was is one.
    """
    width = decoder.spec.intermediate
    multiple = math.gcd(width, max(1, multiple))
    kept = max(multiple, round(width * (1 - ratio) / multiple) * multiple)
    if kept >= width:
        return decoder
    scores = importance.of_width(decoder, sequences, by, seed=seed, heard=_named(progress, "importance"))
    return cuts.with_width(decoder, importance.most_important(scores, kept))


def prune_heads(
    decoder: HeldDecoder,
    sequences: Sequences,
    *,
    ratio: float,
    least: int,
    by: Importance,
    seed: int,
    progress: Progress,
) -> HeldDecoder:
    """Return the decoder without a share of its key-value heads and of the query heads that read them."""
    heads = decoder.spec.kv_heads
    kept = max(least, 1, round(heads * (1 - ratio)))
    if kept >= heads:
        return decoder
    scores = importance.of_heads(decoder, sequences, by, seed=seed, heard=_named(progress, "importance"))
    return cuts.with_heads(decoder, importance.most_important(scores, kept))


def drop_layers(
    decoder: HeldDecoder, sequences: Sequences, *, count: int, progress: Progress
) -> tuple[HeldDecoder, list[int]]:
    """Return the decoder without the ``count`` layers that it misses least, fewer than it has, and which these were."""
    layers = len(decoder.spec.layers)
    gone = importance.least_important_layers(
        decoder, sequences[:_LAYER_SEQUENCES], count, _named(progress, "layers left out")
    )
    kept = [index for index in range(layers) if index not in gone]
    return cuts.with_layers(decoder, kept), [decoder.origins[index] for index in gone]


def _named(progress: Progress, what: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(what, done, total)
