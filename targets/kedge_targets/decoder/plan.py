"""What a decoder's file is made from, independent of the backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kedge_targets.decoder.matrix import Matrix
from kedge_targets.decoder.spec import Array

PROBES = ("attention", "o", "feed_forward", "down")
"""Inputs of a layer's matrices: of queries, keys and values; of the output projection; of gate and up; of down."""
PROBE_OF = {
    **dict.fromkeys(("q", "k", "v"), "attention"),
    "o": "o",
    **dict.fromkeys(("gate", "up"), "feed_forward"),
    "down": "down",
}
"""Matrix of a layer → the probe of its input."""


@dataclass(frozen=True, kw_only=True)
class CacheScales:
    """How a layer's keys and values are stored in int8: ``real = code * scale``.

    Attributes:
        keys, values: a scale for each channel, float32 [kv heads, head size], with the kernel's head layout.
    """

    keys: Array
    values: Array


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One layer, ready to be stored.

    Attributes:
        matrices: matrices by their names in :class:`kedge_targets.decoder.spec.Weights`.
        vectors: norms and biases, float32, with the matrices' head layout.
        cache: how keys and values are stored; None for float32.
    """

    matrices: dict[str, Matrix]
    vectors: dict[str, Array]
    cache: CacheScales | None = None


Pieces = Callable[[int], Piece]
"""Index of a layer → the layer; called once for each, in order, so that only one needs to be in memory."""
