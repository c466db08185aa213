"""The short form of ``make bench ARGS=gates``: error probabilities are met and samples saved, on rollouts drawn at
random with the seeds below."""

from __future__ import annotations

import pytest
from tests.support.drawn_cohorts import Drawing, Outcome, by_gate, by_test, interval
from tests.support.drawn_rollouts import GOOD, RELEASES, play

from kedge.fleet.staged import sequential
from kedge.fleet.staged.sequential import Effect

ROLLOUTS = 300


@pytest.fixture(scope="module")
def tested() -> Outcome:
    return by_test(1, ROLLOUTS, Drawing(bursts=20.0))


def test_the_observed_error_rates_hold_the_stated_ones(tested: Outcome) -> None:
    for count in (tested.false_aborts, tested.misses):
        low, high = interval(count, tested.rollouts)
        assert low <= 0.05 <= high


def test_a_sequential_test_needs_three_fifths_of_a_fixed_ones_calls_at_most(tested: Outcome) -> None:
    assert tested.ratio <= 0.6


def test_the_gate_keeps_its_error_rates_at_most_with_bursts_of_errors_too() -> None:
    found = by_gate(3, 100, Drawing(calls=12, bursts=10.0))
    assert interval(found.false_aborts, found.rollouts)[0] <= 0.05
    assert interval(found.misses, found.rollouts)[0] <= 0.05


def test_good_releases_on_noisy_devices_pass_and_bad_ones_end_in_the_first_wave() -> None:
    good = play(5, 40, GOOD)
    assert len(good.minutes) <= 2
    assert good.promoted >= 36
    for name, release in RELEASES.items():
        if release is not GOOD:
            assert play(6, 10, release).aborted == 1.0, name


def test_a_test_without_correction_for_overshoot_is_the_more_careful() -> None:
    """Wald's bounds are inequalities: met exactly only where the ratio stops on its boundary."""
    plain, corrected = sequential.boundaries(0.05, 0.05), sequential.boundaries(0.05, 0.05, step=1.0)
    assert plain.upper > corrected.upper > 0 > corrected.lower > plain.lower


def test_a_pooled_effect_weighs_by_information() -> None:
    found = sequential.pooled([Effect(1.0, 1.0), Effect(4.0, 2.0)])
    assert [found.estimate, found.variance] == pytest.approx([2.0, 2 / 3])
