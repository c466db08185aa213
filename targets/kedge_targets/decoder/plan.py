"""What a decoder's file is made with, whatever the backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kedge_targets.decoder.matrix import Matrix
from kedge_targets.decoder.spec import Array

PROBES = ("attention", "o", "feed_forward", "down")
"""Inputs of a layer's matrices: of queries, keys and values; of what gathers the heads; of gate and up; of down."""
PROBE_OF = {
    **dict.fromkeys(("q", "k", "v"), "attention"),
    "o": "o",
    **dict.fromkeys(("gate", "up"), "feed_forward"),
    "down": "down",
}
"""Matrix of a layer → the probe that sees its input."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One layer, or what stands outside the layers, ready to be stored.

    Attributes:
        matrices: by the names of :class:`kedge_targets.decoder.spec.Weights`.
        vectors: norms and biases, float32, heads laid out as the matrices' are.
    """

    matrices: dict[str, Matrix]
    vectors: dict[str, Array]


Pieces = Callable[[int], Piece]
"""Index of a layer → the layer; called once for each, in order, so that one alone need be in memory."""
