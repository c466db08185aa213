"""Layers of a decoder that get 8 bits where the others have 4."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kedge.compiler.decoders.budget import Budget
from kedge.evaluation.decoders.figures import Figures
from kedge.quantization.decoder_mixing import with_more_bits
from kedge.quantization.decoder_scheme import Scheme, parse
from kedge_protocol.errors import ConfigError

DAMAGES = st.lists(st.floats(1e-6, 1.0), min_size=2, max_size=40)


@given(damages=DAMAGES, excess=st.floats(1.01, 50))
def test_the_layers_that_lose_most_get_more_bits_until_the_rest_is_allowed(damages: list[float], excess: float) -> None:
    found = with_more_bits(Scheme(), damages, excess)
    if found is None:
        # All would have to.
        assert min(damages) > 0.9 * sum(damages) / excess - sum(damages) / 256
        return
    chosen = set(found.int8_layers)
    rest = [damage for at, damage in enumerate(damages) if at not in chosen]
    assert sum(rest) <= sum(damages) / excess
    assert min(damages[at] for at in chosen) >= max(rest)
    assert found.name == "mixed"


@given(damages=DAMAGES)
def test_a_second_scheme_has_more_layers_than_the_first(damages: list[float]) -> None:
    first = with_more_bits(Scheme(), damages, 1.2)
    if first is None:
        return
    second = with_more_bits(first, [d / 256 if at in first.int8_layers else d for at, d in enumerate(damages)], 1.5)
    assert second is None or set(first.int8_layers) < set(second.int8_layers)


def test_nothing_is_mixed_where_nothing_was_measured_or_nothing_has_four_bits() -> None:
    assert with_more_bits(Scheme(), [], 2.0) is None
    assert with_more_bits(Scheme(precision="int8"), [0.1, 0.2], 2.0) is None
    assert with_more_bits(Scheme(), [0.1, 0.2], math.inf) is None


def test_the_loss_is_compared_with_the_limit_that_is_exceeded_most() -> None:
    figures = Figures(
        perplexity=11.0, reference=10.0, ratio_error=0.0, kl=0.2, kl_error=0.0, agreement=0.9, agreement_error=0.0,
        tokens=100,
    )  # fmt: skip
    assert Budget(max_ratio=1.05).excess(figures) == pytest.approx(math.log(1.1) / math.log(1.05))
    assert Budget(max_perplexity=10.5).excess(figures) == pytest.approx(math.log(1.1) / math.log(1.05))
    assert Budget(max_ratio=1.05, max_kl=0.05).excess(figures) == pytest.approx(4.0)
    assert Budget(max_perplexity=9.0).excess(figures) == math.inf
    assert Budget(max_ratio=1.2, max_kl=0.4).excess(figures) < 1


def test_layers_are_named_in_a_scheme() -> None:
    scheme = parse("precision=int4,int8_layers=5+0")
    assert scheme.int8_layers == (0, 5)
    assert [scheme.bits_of(at) for at in (0, 1, 5)] == [8, 4, 8]
    assert scheme.label == "int4 g32 gptq, 2 layers int8, embedding int8"
    for wrong, reason in (
        ("int8_layers=a", "are no layers"),
        ("precision=int8,int8_layers=1", "have no place in int8"),
    ):
        with pytest.raises(ConfigError, match=reason):
            parse(wrong)
