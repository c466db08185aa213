"""Scales of keys and values in int8."""

from __future__ import annotations

import numpy as np

from kedge.quantization import decoder_cache

_HEADS, _POSITIONS, _SIZE = 2, 60, 16


def test_the_key_of_the_first_token_lies_on_the_grid() -> None:
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(_HEADS, _POSITIONS, _SIZE)).astype(np.float32)
    keys[:, 0] *= 3
    first = keys[:, 0]
    found = decoder_cache.scales([keys], [keys], first).keys
    codes = np.abs(first) / found
    fine = codes >= 4
    assert fine.mean() > 0.8
    np.testing.assert_allclose(codes[fine], np.rint(codes[fine]), atol=1e-4)
    assert codes.max() <= 127.001
    plain = np.abs(keys).max(axis=1) / 127
    assert np.all(found >= plain * 0.999)
    assert np.all(found <= plain * 1.26)
