"""The codes of a decoder's embedding and head."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kedge.quantization.decoder_layers import correlations, table
from kedge.quantization.decoder_scheme import LADDER, Scheme
from kedge_targets.decoder import rounding
from kedge_targets.decoder.matrix import Codes
from kedge_targets.decoder.rounding import Grid

SMALL = Scheme(embedding="int4", symmetric=True)


def _head() -> tuple[np.ndarray, np.ndarray]:
    """A head [tokens, channels] and inputs that lie mostly in a few directions."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(8, 96))
    rows = rng.normal(size=(400, 8)) @ directions + 0.2 * rng.normal(size=(400, 96))
    return rng.normal(size=(300, 96)).astype(np.float32), rows.astype(np.float32)


def _error(head: np.ndarray, codes: object, rows: np.ndarray) -> float:
    assert isinstance(codes, Codes)
    return float(((rows @ (codes.real() - head).T) ** 2).mean())


def test_a_head_that_is_rounded_with_its_inputs_errs_less_on_them() -> None:
    head, rows = _head()
    learned = table(head, SMALL, correlations(rows))
    assert _error(head, learned, rows) < 0.5 * _error(head, table(head, SMALL), rows)


def test_eight_bits_are_rounded_to_the_nearest_code_whatever_the_inputs_are() -> None:
    head, rows = _head()
    scheme = replace(SMALL, embedding="int8")
    learned, plain = table(head, scheme, correlations(rows)), table(head, scheme)
    assert isinstance(learned, Codes)
    assert isinstance(plain, Codes)
    np.testing.assert_array_equal(learned.codes, plain.codes)


@pytest.mark.parametrize("symmetric", [False, True])
def test_zero_points_of_the_embedding_are_stored_where_those_of_the_layers_are(symmetric: bool) -> None:
    found = table(_head()[0], replace(SMALL, symmetric=symmetric))
    assert isinstance(found, Codes)
    assert (found.zeros is None) == symmetric


@pytest.mark.parametrize("size", [1, 96, 301])
def test_what_one_column_hands_on_is_the_cholesky_factor_of_the_inverse(size: int) -> None:
    rows = np.random.default_rng(size).normal(size=(4 * size, size)).astype(np.float32)
    products = correlations(rows)
    upper = rounding.Inputs.of(products).upper.astype(np.float64)
    damped = products + 0.01 * np.diag(products).mean() * np.eye(size)
    np.testing.assert_allclose(upper.T @ upper @ damped, np.eye(size), atol=1e-5)
    np.testing.assert_array_equal(upper, np.triu(upper))


def test_rows_are_rounded_the_same_however_many_are_rounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    head, rows = _head()
    grid = Grid(bits=4, group=32)
    whole = rounding.compensated(head, rounding.Inputs.of(correlations(rows)), grid)
    monkeypatch.setattr(rounding, "_ROWS", 7)
    parts = rounding.compensated(head, rounding.Inputs.of(correlations(rows)), grid)
    np.testing.assert_array_equal(whole.codes, parts.codes)
    np.testing.assert_array_equal(whole.scales, parts.scales)
    assert whole.zeros is not None
    assert parts.zeros is not None
    np.testing.assert_array_equal(whole.zeros, parts.zeros)


def test_schemes_that_differ_in_the_embedding_alone_share_their_layers() -> None:
    assert LADDER[0].same_layers(LADDER[1])
    assert not LADDER[1].same_layers(LADDER[2])
