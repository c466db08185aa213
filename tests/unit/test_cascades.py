"""The choice of a cascade's confidence, and its gate: share, calls at once, circuit breaker."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from kedge.evaluation.cascade import chosen_confidence, cross_fitted
from kedge_protocol.errors import ConfigError
from kedge_targets.pipeline import cascades, declaration
from kedge_targets.pipeline.cascades import Gate


@pytest.mark.parametrize("seed", range(20))
def test_the_chosen_confidence_is_the_best_of_all_that_keep_the_share(seed: int) -> None:
    rng = np.random.default_rng(seed)
    confidence = rng.integers(0, 12, 60) / 12
    right = rng.random(60) < confidence
    helped = rng.random(60) < 0.8
    share = float(rng.uniform(0.05, 1.0))

    def value(below: float) -> tuple[float, float]:
        passed = confidence < below
        return float(np.where(passed, helped, right).mean()), float(passed.mean())

    tried = [value(below) for below in [*np.unique(confidence), 2.0]]
    best = max(accuracy for accuracy, passed in tried if passed <= share + 1e-9)
    fewest = min(passed for accuracy, passed in tried if accuracy == best and passed <= share + 1e-9)
    assert value(chosen_confidence(confidence, right, helped, share)) == pytest.approx((best, fewest))


def test_cross_fitted_figures_do_not_flatter_a_choice_among_noise() -> None:
    rng = np.random.default_rng(0)
    gains, unseen = [], []
    for _ in range(60):
        confidence, right, helped = rng.random(100), rng.random(100) < 0.7, rng.random(100) < 0.7
        below = chosen_confidence(confidence, right, helped, 0.5)
        gains.append(np.where(confidence < below, helped, right).mean() - right.mean())
        unseen.append(np.where(cross_fitted(confidence, right, helped, 0.5), helped, right).mean() - right.mean())
    assert np.mean(gains) > 0.02
    assert abs(np.mean(unseen)) < 0.015


@pytest.mark.parametrize("share", [0.05, 0.2, 0.7, 1.0])
def test_no_run_of_items_passes_on_more_than_its_share_and_a_burst(share: float) -> None:
    gate = Gate(share)
    draw = random.Random(3)
    passed = []
    for number in range(2000):
        went = gate.passes(sure=number % 700 < 350 and draw.random() < 0.9)
        passed.append(went)
        if went:
            gate.answered()
            gate.ended()
    for start in range(0, 2000, 50):
        for end in range(start + 1, 2001, 50):
            assert sum(passed[start:end]) <= share * (end - start) + cascades.BURST
    assert gate.counts.items == 2000
    assert gate.counts.escalated == sum(passed)


def test_after_failures_in_a_row_the_larger_model_is_left_alone_and_tried_with_one_item() -> None:
    now = 100.0
    gate = Gate(1.0, lambda: now)

    def fails() -> bool:
        went = gate.passes(sure=False)
        if went:
            gate.failed()
            gate.ended()
        return went

    assert [fails() for _ in range(5)] == [True, True, True, False, False]
    now += 1.1
    assert gate.passes(sure=False)
    assert not gate.passes(sure=False), "one item tries"
    gate.failed()
    gate.ended()
    now += 1.1
    assert not gate.passes(sure=False), "the pause has doubled"
    now += 1.0
    assert gate.passes(sure=False)
    gate.answered()
    gate.ended()
    assert [fails() for _ in range(4)] == [True, True, True, False]
    assert (gate.counts.away, gate.counts.escalated) == (7, 1)


def test_calls_that_hang_take_no_more_than_their_places() -> None:
    gate = Gate(1.0)
    went = [gate.passes(sure=False) for _ in range(20)]
    assert sum(went) == cascades.AT_ONCE
    assert gate.counts.paused == 12


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('task = "detection"\n[cascade]\nurl = "http://a:1"\nmodel = "m"', "only with [scores]"),
        ('task = "classification"\n[cascade]\nurl = "a:1"\nmodel = "m"', "http://host:port"),
        ('task = "classification"\n[cascade]\nurl = "http://a:1"\nmodel = "m"\nshare = 0', "above 0, at most 1"),
        ('task = "classification"\n[cascade]\nurl = "http://a:1"\nmodel = "m"\nbelow = 2', "0 to 1"),
        ('task = "classification"\n[cascade]\nurl = "http://a:1"\nmodel = "m"\ndeadline_ms = 0', "milliseconds"),
        ('task = "classification"\n[cascade]\nurl = "http://a:1"', "model"),
    ],
)
def test_a_cascade_that_cannot_be_is_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "pipeline.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        declaration.read(path)
    assert said in str(error.value)
