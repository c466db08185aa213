"""Metrics: what is chosen, and its value."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kedge.compiler.metric import Kind, agreement, check_labels, choose, cosine, score
from kedge_protocol.errors import DatasetError

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(40, 5)).astype(np.float32)
EMBEDDINGS = (LOGITS / np.linalg.norm(LOGITS, axis=1, keepdims=True)).astype(np.float32)


def test_labels_mean_top1() -> None:
    choice = choose(None, labelled=True, outputs={"y": LOGITS})
    labels = LOGITS.argmax(axis=1).copy()
    labels[:10] = (labels[:10] + 1) % 5
    assert (choice.kind, choice.name) == (Kind.TOP1, "top1")
    assert score(choice, {"y": LOGITS}, {"y": LOGITS}, {}, labels) == 0.75


def test_class_scores_without_labels_mean_agreement() -> None:
    choice = choose(None, labelled=False, outputs={"y": LOGITS})
    other = LOGITS.copy()
    other[:4] = -other[:4]
    assert choice.name == "agreement"
    assert score(choice, {"y": other}, {"y": LOGITS}, {}, None) == 0.9


@pytest.mark.parametrize("output", [EMBEDDINGS, LOGITS[:, :1], LOGITS.reshape(10, 4, 5), LOGITS[:, 0]])
def test_what_looks_like_no_class_scores_means_cosine(output: np.ndarray) -> None:
    choice = choose(None, labelled=False, outputs={"y": output})
    assert choice.name == "cosine"
    assert score(choice, {"y": output}, {"y": output}, {}, None) == 1.0
    assert agreement(choice, {"y": output}, {"y": output}) is None


def test_saturated_probabilities_are_class_scores_although_of_unit_length() -> None:
    assert choose(None, labelled=False, outputs={"y": np.eye(5, dtype=np.float32)}).kind is Kind.AGREEMENT


def test_labels_without_class_scores_are_refused() -> None:
    with pytest.raises(DatasetError, match="output 'y' of shape 40x1 holds no class scores"):
        choose(None, labelled=True, outputs={"y": LOGITS[:, :1]})


def test_the_users_metric_is_named_without_its_folder() -> None:
    assert choose("/a/b/mine.py:f1", labelled=True, outputs={"y": LOGITS}).name == "mine.py:f1"


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (np.arange(40) % 5 + 1, "label holds 5, the model's 5 classes are 0 to 4"),
        (np.arange(40) % 5 - 1, "label holds -1"),
        (np.zeros(40), "dtype float64"),
        (np.zeros((40, 1), int), "shape 40x1, 40 was expected"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels: np.ndarray, said: str) -> None:
    with pytest.raises(DatasetError, match=said):
        check_labels(labels, LOGITS, where="evaluation")


@given(st.integers(1, 30), st.integers(1, 6), st.floats(0.1, 10))
def test_cosine_is_one_for_any_positive_multiple_and_minus_one_for_the_negative(
    rows: int, columns: int, factor: float
) -> None:
    values = np.random.default_rng(rows).normal(size=(rows, columns))
    assert cosine({"y": values * factor}, {"y": values}) == pytest.approx(1.0)
    assert cosine({"y": -values}, {"y": values}) == pytest.approx(-1.0)


def test_cosine_takes_all_outputs_together() -> None:
    a, b = np.array([[1.0, 0.0]]), np.array([[1.0]])
    assert cosine({"a": a, "b": b}, {"a": a, "b": -b}) == pytest.approx(0.0)


def test_cosine_of_zeros_and_of_nans() -> None:
    zero, one = np.zeros((1, 2)), np.ones((1, 2))
    assert cosine({"y": zero}, {"y": zero}) == 1.0
    assert cosine({"y": zero}, {"y": one}) == 0.0
    assert cosine({"y": one * np.nan}, {"y": one}) == 0.0
