"""Stores a decoder's keys and values in int8 with a scale for each channel, and changes its layers so that this costs
less while they compute the same.

Most heads look at the first token where they look for nothing (Xiao et al., "Efficient Streaming Language Models with
Attention Sinks", ICLR 2024). Its values are small and nearly the same in every text, and a step that fits the other
tokens is coarse for them. As weights of attention add up to 1, a constant may be taken from all values and be added to
the output: here the first token's values, which then are stored as 0. Its keys are large, and scales are chosen that
have them on the grid.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kedge_targets.decoder.matrix import real
from kedge_targets.decoder.plan import CacheScales, Piece
from kedge_targets.decoder.spec import Array, DecoderSpec

_CODES = 127
"""Largest code of int8 that is used."""
_SMALLEST = 1e-6
"""Scales are above 0 even for channels that are always 0."""
_FINE = 4
"""Least code of the first token's key for which a scale is widened: by a quarter at most."""


def shifted(spec: DecoderSpec, piece: Piece, values: list[Array]) -> Piece:
    """Take the first token's values from all values of a layer in float, by its biases.

    Args:
        values: of each calibration text, float32 [kv heads, positions, size].
    """
    first = np.mean([one[:, 0] for one in values], axis=0)
    out = real(piece.matrices["o"])
    attended = np.repeat(first, spec.heads // spec.kv_heads, axis=0).reshape(-1)
    vectors = dict(piece.vectors)
    vectors["v.bias"] = vectors.get("v.bias", np.float32(0)) - first.reshape(-1)
    vectors["o.bias"] = vectors.get("o.bias", np.float32(0)) + out @ attended
    return replace(piece, vectors=vectors)


def scales(keys: list[Array], values: list[Array], first: Array) -> CacheScales:
    """Return the scales of a layer's channels.

    Args:
        keys: of each calibration text, rotated as at any position of the context, float32 [kv heads, positions, size].
        values: of each calibration text.
        first: keys of the first token, [kv heads, size].
    """
    largest = np.maximum(np.abs(np.concatenate(keys, axis=1)).max(axis=1), _SMALLEST) / _CODES
    codes = np.floor(np.abs(first) / largest)
    aligned = np.where(codes >= _FINE, np.abs(first) / np.maximum(codes, 1), largest)
    return CacheScales(keys=aligned.astype(np.float32), values=_best_scales(np.concatenate(values, axis=1)))


def rotated(keys: Array, angles: Array) -> Array:
    """Return keys [heads, positions, size] rotated on by angles in radians [positions, size / 2]."""
    half = keys.shape[-1] // 2
    first, second = keys[..., :half], keys[..., half:]
    cosines, sines = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    found: Array = np.concatenate([first * cosines - second * sines, second * cosines + first * sines], axis=-1)
    return found


def _best_scales(values: Array) -> Array:
    """Return for each channel the scale with the least squared error of rounding and clipping, float32 [heads, size].

    Args:
        values: float32 [heads, positions, size].
    """
    largest = np.maximum(np.abs(values).max(axis=1), _SMALLEST)
    best, least = largest / _CODES, np.full(largest.shape, np.inf)
    for share in np.linspace(0.4, 1, 13):
        tried = (largest * np.float32(share)) / _CODES
        codes = np.clip(np.rint(values / tried[:, None]), -_CODES - 1, _CODES)
        errors = ((codes * tried[:, None] - values) ** 2).mean(axis=1)
        better = errors < least
        best, least = np.where(better, tried, best), np.where(better, errors, least)
    found: Array = best.astype(np.float32)
    return found
