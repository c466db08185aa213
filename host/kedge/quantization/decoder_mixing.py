"""Chooses the layers of a decoder that have 8 bits where the others have 4, by the damage of each layer's codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kedge.quantization.decoder_scheme import Scheme

MARGIN = 0.9
"""Share of the allowed loss that is aimed at: damages of layers add up only roughly."""
_KEPT = 1 / 256
"""Damage of a layer in 8 bits relative to 4: steps are 16 times as small."""


def with_more_bits(scheme: Scheme, damages: Sequence[float], excess: float) -> Scheme | None:
    """Return a scheme that loses no more than allowed, as far as the layers' damages tell.

    It has as few layers in 8 bits as possible; None if all would have to be, or nothing was measured.

    Args:
        scheme: the tried scheme, with 4 bits.
        damages: its layers' damages; see :class:`kedge.quantization.decoder_layers.QuantizedLayers`.
        excess: its measured loss divided by the allowed loss, above 1.
    """
    if scheme.bits != 4 or not damages:
        return None
    allowed = MARGIN * sum(damages) / excess
    chosen = set(scheme.int8_layers)
    left = sum(damages)
    for index in sorted(range(len(damages)), key=lambda at: -damages[at]):
        if left <= allowed:
            break
        if index not in chosen:
            chosen.add(index)
            left -= damages[index] * (1 - _KEPT)
    if len(chosen) == len(damages) or chosen == set(scheme.int8_layers):
        return None
    return replace(scheme, int8_layers=tuple(sorted(chosen)))
