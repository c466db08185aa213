"""Cuts a decoder: inner units, key-value heads with their queries, or whole layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np

from kedge.training.decoder.weights import HeldDecoder, HeldWeights
from kedge_targets.decoder.spec import Array

Cut: TypeAlias = Callable[[Mapping[str, Array], Array], dict[str, Array]]
"""A layer's tensors and the indices that stay → what is left of the tensors."""
Kept: TypeAlias = Sequence[Array]
"""For each layer the indices that stay, sorted; the same number in every layer."""


def with_width(decoder: HeldDecoder, kept: Kept) -> HeldDecoder:
    """Return the decoder with these units of its feed-forward networks."""

    def cut(layer: Mapping[str, Array], units: Array) -> dict[str, Array]:
        found = dict(layer)
        for name in ("gate", "up", "gate.bias", "up.bias"):
            if name in found:
                found[name] = found[name][units]
        found["down"] = found["down"][:, units]
        return found

    spec = replace(decoder.spec, intermediate=len(kept[0]))
    return replace(decoder, spec=spec, weights=_each(decoder, cut, kept))


def with_heads(decoder: HeldDecoder, kept: Kept) -> HeldDecoder:
    """Return the decoder with these key-value heads, each with the query heads that read it."""
    spec, size = decoder.spec, decoder.spec.head_size
    each = spec.heads // spec.kv_heads

    def channels(heads: Array, width: int) -> Array:
        found: Array = (heads[:, None] * width + np.arange(width)).ravel()
        return found

    def cut(layer: Mapping[str, Array], heads: Array) -> dict[str, Array]:
        found = dict(layer)
        for name, width in (("q", each * size), ("k", size), ("v", size)):
            for part in (name, f"{name}.bias"):
                if part in found:
                    found[part] = found[part][channels(heads, width)]
        found["o"] = found["o"][:, channels(heads, each * size)]
        return found

    count = len(kept[0])
    return replace(
        decoder,
        spec=replace(spec, heads=count * each, kv_heads=count),
        weights=_each(decoder, cut, kept),
    )


def with_layers(decoder: HeldDecoder, kept: Sequence[int]) -> HeldDecoder:
    """Return the decoder with these layers."""
    return HeldDecoder(
        spec=replace(decoder.spec, layers=tuple(decoder.spec.layers[index] for index in kept)),
        weights=replace(decoder.weights, layers=[decoder.weights.layers[index] for index in kept]),
        origins=tuple(decoder.origins[index] for index in kept),
    )


def _each(decoder: HeldDecoder, cut: Cut, kept: Kept) -> HeldWeights:
    layers = [cut(layer, units) for layer, units in zip(decoder.weights.layers, kept, strict=True)]
    return replace(decoder.weights, layers=layers)
