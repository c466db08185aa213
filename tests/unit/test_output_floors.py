"""A lost output never passes: each is broken in every way, and the floor says why; what is only rounded keeps it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kedge.evaluation.kinds import ClassifiedOutput, OutputKind
from kedge.evaluation.outputs import EXACT_DB, OutputFigures, one
from kedge.search.budget import Budget

Array = npt.NDArray[Any]


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def detections(rng: np.random.Generator, samples: int = 24) -> Array:
    """4 rows of boxes beside 12 of sparse scores, three of which never fire."""
    where = np.linspace(20, 600, 100)
    boxes = where + rng.normal(0, 25, (samples, 4, 100))
    scores = 1 / (1 + np.exp(6 - rng.gamma(1.0, 2.0, (samples, 12, 100))))
    scores[:, 3:6] *= 1e-4
    return np.concatenate([boxes, scores], axis=1)


OUTPUTS: dict[str, tuple[OutputKind, bool, Callable[[np.random.Generator], Array]]] = {
    "class scores": (OutputKind.CLASSES, True, lambda rng: softmax(rng.normal(0, 4, (300, 6)))),
    "logits": (OutputKind.CLASSES, False, lambda rng: rng.normal(0, 3, (300, 6))),
    "embedding": (OutputKind.EMBEDDING, False, lambda rng: rng.normal(0, 1, (64, 96))),
    "map": (OutputKind.VALUES, False, lambda rng: rng.normal(0.5, 1, (16, 5, 9, 9))),
    "far from zero": (OutputKind.VALUES, False, lambda rng: 300 + rng.normal(0, 10, (64, 6))),
    "unlike units": (OutputKind.VALUES, False, lambda rng: rng.normal(0, 1, (200, 3)) * [1e3, 1.0, 1e-3]),
    "boxes and scores": (OutputKind.BOXES, True, detections),
    "reconstruction": (OutputKind.RECONSTRUCTION, False, lambda rng: rng.normal(0, 1, (50, 640)) + np.arange(640) / 99),
}


def rounded(y: Array, levels: int, kind: OutputKind) -> Array:
    """As integers of few bits leave it: each channel by its own scale where ranges differ."""
    axis = 1 if kind in (OutputKind.BOXES, OutputKind.VALUES) else None
    others = None if axis is None else tuple(place for place in range(y.ndim) if place != axis)
    low, high = y.min(axis=others, keepdims=True), y.max(axis=others, keepdims=True)
    step = (high - low) / levels
    return np.asarray(np.round(y / step) * step)


def judged(name: str, y: Array, broken: Array) -> OutputFigures:
    kind, bounded, _ = OUTPUTS[name]
    seen = ClassifiedOutput(name="y", kind=kind, why="", bounded=bounded)
    return one(seen, broken.astype(np.float32), y.astype(np.float32))


@pytest.mark.parametrize("name", OUTPUTS)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), noise=st.floats(0, 0.15))
def test_what_is_rounded_or_a_little_noisy_keeps_the_floor(name: str, seed: int, noise: float) -> None:
    rng = np.random.default_rng(seed)
    kind, _, make = OUTPUTS[name]
    y = make(rng)
    assert judged(name, y, y).lost == ""
    assert judged(name, y, y).sqnr_db == EXACT_DB
    assert judged(name, y, rounded(y, 255, kind)).lost == ""
    spread = (y - y.mean(axis=0)).std(axis=0)
    assert judged(name, y, y + rng.normal(0, 1, y.shape) * spread * noise).lost == ""


def zeroed(y: Array, rng: np.random.Generator) -> Array:
    return np.zeros_like(y)


def shuffled(y: Array, rng: np.random.Generator) -> Array:
    return y[np.roll(np.arange(len(y)), len(y) // 3)]


def averaged(y: Array, rng: np.random.Generator) -> Array:
    return np.broadcast_to(y.mean(axis=0), y.shape).copy()


def clipped(y: Array, rng: np.random.Generator) -> Array:
    middle = y.mean(axis=0)
    edge = min(0.25 * np.abs(y - middle).max(), 0.6 * (y - middle).std() if y.ndim < 3 else np.inf)
    return np.asarray(np.clip(y, middle - edge, middle + edge))


def not_finite(y: Array, rng: np.random.Generator) -> Array:
    broken = y.copy()
    broken[len(y) // 2] = np.nan
    return broken


BREAKS = [zeroed, shuffled, averaged, clipped, not_finite]


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("how", BREAKS)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000))
def test_a_broken_output_is_lost(name: str, how: Callable[..., Array], seed: int) -> None:
    rng = np.random.default_rng(seed)
    y = OUTPUTS[name][2](rng)
    figures = judged(name, y, how(y, rng))
    assert figures.lost
    assert (figures.variation_db or 0.0) < 15


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("how", BREAKS)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000), channel=st.integers(0, 2))
def test_one_broken_channel_is_enough(name: str, how: Callable[..., Array], seed: int, channel: int) -> None:
    rng = np.random.default_rng(seed)
    y = OUTPUTS[name][2](rng)
    broken = y.copy()
    broken[:, channel] = how(y[:, channel], rng)
    said = judged(name, y, broken).lost
    assert said


@pytest.mark.parametrize("how", BREAKS)
def test_scores_beside_boxes_are_not_hidden(how: Callable[..., Array]) -> None:
    rng = np.random.default_rng(1)
    y = detections(rng)
    broken = y.copy()
    broken[:, 4:] = how(y[:, 4:], rng)
    figures = judged("boxes and scores", y, broken)
    assert figures.lost
    assert [part.label for part in figures.parts] == ["axis 1: 4-15", "axis 1: 0-3"]
    if how is zeroed:
        assert (figures.cosine or 0.0) > 0.999  # what hid it


def test_a_class_that_is_never_answered_any_more_is_lost() -> None:
    rng = np.random.default_rng(0)
    y = rng.normal(0, 1, (400, 8))
    broken, second = y.copy(), np.sort(y, axis=1)[:, -2]
    broken[:, 2] = np.minimum(y[:, 2], second - 0.01)
    assert "class 2: " in judged("logits", y, broken).lost


def test_few_samples_condemn_nothing_by_chance() -> None:
    y = np.eye(4)[np.arange(8) % 4] * 5.0
    flipped = y.copy()
    flipped[0] = [0, 3, 0, 0]
    assert judged("logits", y, flipped).lost == ""


def of(kind: OutputKind, reference: Array, output: Array) -> OutputFigures:
    return one(ClassifiedOutput(name="y", kind=kind, why=""), output, reference)


def test_what_never_varies_is_held_against_its_magnitude() -> None:
    five = np.full((20, 3), 5.0)
    assert of(OutputKind.VALUES, five, five * 1.01).lost == ""
    assert "never varied" in of(OutputKind.VALUES, five, five * 1.5).lost
    mixed = np.random.default_rng(0).normal(0, 1, (50, 4))
    mixed[:, 2] = 0
    assert of(OutputKind.VALUES, mixed, np.where(mixed == 0, 1e-3, mixed)).lost == ""
    assert of(OutputKind.VALUES, mixed, np.where(mixed == 0, 1.0, mixed)).lost


def test_the_remnants_of_a_dead_channel_are_nothing_and_a_small_channel_is_not() -> None:
    """MiniLM's embedding has a channel of 1e-21: a student of other weights has other remnants there."""
    rng = np.random.default_rng(0)
    meaning = rng.normal(0, 1, (64, 96))
    other = meaning + rng.normal(0, 0.1, meaning.shape)
    meaning[:, 7] *= 1e-21
    other[:, 7] = rng.normal(0, 1e-3, 64)
    assert not of(OutputKind.EMBEDDING, meaning, other).lost
    meaning[:, 7] *= 1e15
    assert "index 7" in of(OutputKind.EMBEDDING, meaning, other).lost


def test_what_hardly_varies_may_have_noise_as_long_as_it_follows() -> None:
    rng = np.random.default_rng(0)
    y = 1 + rng.normal(0, 0.02, (400, 4))
    follows = y + rng.normal(0, 0.04, y.shape)
    assert of(OutputKind.VALUES, y, follows).lost == ""
    assert of(OutputKind.VALUES, y, rng.permutation(y)).lost


def test_what_the_float_model_has_not_finite_counts_nothing() -> None:
    y = np.random.default_rng(0).normal(0, 1, (30, 4))
    y[3, 1], y[4, 2] = -np.inf, np.nan
    figures = of(OutputKind.VALUES, y, np.where(np.isfinite(y), y, 7.0))
    assert (figures.lost, figures.sqnr_db) == ("", EXACT_DB)
    nothing = of(OutputKind.VALUES, np.full((9, 2), np.nan), np.zeros((9, 2)))
    assert nothing.lost == ""


def test_integers_agree_or_are_lost() -> None:
    labels = np.arange(100) % 7
    assert of(OutputKind.INTEGERS, labels, labels).agreement == 1.0
    assert of(OutputKind.INTEGERS, labels, (labels + (np.arange(100) < 20)) % 7).lost == ""
    assert "0.2 of its values" in of(OutputKind.INTEGERS, labels, np.where(np.arange(100) < 20, labels, 9)).lost
    best = np.tile(np.array([3, 1, 2]), (20, 1))
    assert of(OutputKind.INTEGERS, best, best[:, [1, 0, 2]]).lost == ""


def test_an_empty_output_has_no_figures() -> None:
    figures = of(OutputKind.EMPTY, np.zeros((9, 0)), np.zeros((9, 0)))
    assert (figures.lost, figures.sqnr_db) == ("", None)


def test_a_probability_has_errors_and_flips_in_place_of_an_angle() -> None:
    p = np.linspace(0.0, 1.0, 201)[:, None]
    seen = ClassifiedOutput(name="p", kind=OutputKind.PROBABILITY, why="", bounded=True)
    figures = one(seen, p - 0.05, p)
    assert figures.cosine is None
    assert figures.largest_error == pytest.approx(0.05)
    (flips,) = figures.flips
    assert (flips.threshold, flips.above) == (0.5, pytest.approx(0.5, abs=0.01))
    assert flips.flipped == pytest.approx(0.05, abs=0.01)
    assert figures.agreement == pytest.approx(0.95, abs=0.01)


def test_the_budget_refuses_what_is_lost_whatever_the_metric_says() -> None:
    budget, lost = Budget(max_drop=1.0), ("output 'y' is lost: all of it",)
    assert budget.excess(drop=-1.0, size=1, latency=None, lost=lost) == {"output": 100.0}
    assert budget.said(drop=-1.0, size=1, latency=None, lost=lost) == "output 'y' is lost: all of it"
