"""How far values reach that calibration did not see."""

from __future__ import annotations

import numpy as np
import pytest

from kedge_targets.graph.unseen_ends import FEW, Ends, growth


def test_the_growth_of_an_exponential_tail_is_its_scale_times_ln_2() -> None:
    found = [growth(np.random.default_rng(seed).exponential(3.0, 400)) for seed in range(300)]
    assert np.mean(found) == pytest.approx(3.0 * np.log(2), rel=0.1)


def test_what_is_bounded_does_not_grow() -> None:
    found = growth(np.random.default_rng(0).uniform(0, 1, 400))
    assert found < 0.02
    assert growth(np.ones(50)) == 0.0
    assert growth([3.0]) == 0.0


def test_ends_of_few_values_lie_further_out_and_hold_what_comes() -> None:
    rng = np.random.default_rng(0)
    clipped = {"seen": 0, "beyond": 0}
    for _ in range(100):
        seen, later = rng.normal(size=(96, 8)), rng.normal(size=(32, 8))
        ends = Ends()
        ends.add(seen, 96)
        low, high = ends.beyond(seen.min(), seen.max())
        assert low < seen.min()
        assert high > seen.max()
        assert high < 2 * seen.max()
        clipped["seen"] += int(later.max() > seen.max() or later.min() < seen.min())
        clipped["beyond"] += int(later.max() > high or later.min() < low)
    assert clipped["seen"] > 40
    assert clipped["beyond"] < 10


def test_chance_among_the_two_largest_decides_little() -> None:
    """Where these lie close together by chance, the range must reach all the same."""
    rng = np.random.default_rng(0)
    found = [growth(rng.exponential(1.0, 96)) for _ in range(300)]
    assert np.quantile(found, 0.05) > 0.3
    assert np.mean(found) == pytest.approx(np.log(2), rel=0.1)


def test_a_tail_of_which_a_relu_left_little_is_known_by_what_it_left() -> None:
    rng = np.random.default_rng(0)
    found = [growth(np.maximum(rng.exponential(1.0, 96) - np.log(20), 0.0)) for _ in range(300)]
    assert np.mean(found) == pytest.approx(np.log(2), rel=0.1)


def test_many_values_an_end_at_0_and_other_axes_stay() -> None:
    rng = np.random.default_rng(0)
    for values, samples in ((rng.normal(size=(4, FEW + 1)), 4), (rng.normal(size=(5, 3)), 4)):
        ends = Ends()
        ends.add(values, samples)
        assert ends.beyond(-1.0, 1.0) == (-1.0, 1.0)
    ends = Ends()
    positive = np.abs(rng.normal(size=(50, 4)))
    ends.add(positive, 50)
    assert ends.beyond(0.0, positive.max())[0] == 0.0
