"""Metrics: which is chosen for what an output is, and its value."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kedge.evaluation import decisions, kinds, metric
from kedge.evaluation.kinds import GraphEvidence, OutputKind
from kedge.evaluation.metrics import Direction, find, known
from kedge.evaluation.metrics.classes import check_labels
from kedge_protocol.errors import ConfigError, DatasetError

Array = npt.NDArray[Any]

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(40, 5)).astype(np.float32)
EMBEDDINGS = (LOGITS / np.linalg.norm(LOGITS, axis=1, keepdims=True)).astype(np.float32)
SOFTMAX, SIGMOID = GraphEvidence(distribution=True, sigmoid=True), GraphEvidence(sigmoid=True)


def seen(
    outputs: dict[str, Array], labels: Array | None = None, behind: GraphEvidence | None = None, **options: Any
) -> dict[str, kinds.ClassifiedOutput]:
    graph = dict.fromkeys(outputs, behind or GraphEvidence())
    return kinds.classify_outputs(outputs, graph=graph, inputs={}, labels=labels, **options)


def chosen(
    outputs: dict[str, Array], labels: Array | None = None, behind: GraphEvidence | None = None, text: str | None = None
) -> metric.Choice:
    told = seen(outputs, labels, behind, named=metric.named_output(text))
    return metric.choose(text, kinds=told, reference=outputs, labels=labels)


def value(choice: metric.Choice, outputs: dict[str, Array], reference: dict[str, Array], labels: Any = None) -> float:
    return metric.score(choice, outputs, reference, {}, labels).value


def test_labels_that_fit_mean_top1() -> None:
    labels = LOGITS.argmax(axis=1).copy()
    labels[:10] = (labels[:10] + 1) % 5
    choice = chosen({"y": LOGITS}, labels)
    assert (choice.kind, choice.name, choice.output, choice.direction) == ("top1", "top1", "y", Direction.HIGHER)
    assert value(choice, {"y": LOGITS}, {"y": LOGITS}, labels) == 0.75


def test_labels_are_of_the_output_that_they_fit_best_and_never_of_an_input_passed_through() -> None:
    labels = LOGITS.argmax(axis=1)
    features = RNG.normal(size=(40, 16)).astype(np.float32)
    assert chosen({"features": features, "y": LOGITS}, labels).output == "y"
    integers = {"label": labels, "y": LOGITS}
    assert chosen(integers, labels).output == "y"


def test_a_probability_with_labels_of_yes_and_no_is_right_on_its_side_of_a_half() -> None:
    p = RNG.random((40, 1)).astype(np.float32)
    labels = (p[:, 0] > 0.5).astype(int)
    choice = chosen({"p": p}, labels, SIGMOID)
    assert choice.kind == "top1"
    assert value(choice, {"p": 1 - p}, {"p": p}, labels) == 0.0


def test_class_scores_without_labels_mean_agreement() -> None:
    other = LOGITS.copy()
    other[:4] = -other[:4]
    probabilities = np.exp(LOGITS) / np.exp(LOGITS).sum(axis=1, keepdims=True)
    for reference, behind in ((LOGITS, SOFTMAX), (probabilities, GraphEvidence())):
        choice = chosen({"y": reference}, behind=behind)
        assert choice.name == "agreement"
        assert value(choice, {"y": other}, {"y": reference}) == 0.9


@pytest.mark.parametrize("output", [LOGITS, EMBEDDINGS, LOGITS.reshape(10, 4, 5)])
def test_what_nothing_tells_to_be_class_scores_means_cosine(output: Array) -> None:
    choice = chosen({"y": output})
    assert choice.name == "cosine"
    assert value(choice, {"y": output}, {"y": output}) == 1.0
    assert decisions.agreement(choice.seen, {"y": output}, {"y": output}) is None


@pytest.mark.parametrize("output", [LOGITS[:, :1], LOGITS[:, 0]])
def test_one_number_means_r2(output: Array) -> None:
    choice = chosen({"y": output})
    assert choice.name == "r2"
    assert value(choice, {"y": output}, {"y": output}) == 1.0
    assert value(choice, {"y": np.full_like(output, output.mean())}, {"y": output}) == pytest.approx(0, abs=1e-6)
    assert value(choice, {"y": np.sign(output)}, {"y": output}) < 0.9


def test_several_numbers_with_labels_of_their_shape_mean_r2_of_each() -> None:
    """As scikit-learn's ``r2_score`` has it: a column of small numbers weighs as much as one of large ones."""
    labels = RNG.normal(size=(40, 3)) * [1, 10, 1000]
    output = labels + RNG.normal(size=(40, 3))
    choice = chosen({"y": output}, labels)
    assert choice.name == "r2"
    each = 1 - ((output - labels) ** 2).sum(axis=0) / ((labels - labels.mean(axis=0)) ** 2).sum(axis=0)
    assert value(choice, {"y": output}, {"y": output}, labels) == pytest.approx(each.mean())
    hot = (labels > 0).astype(np.float32)
    assert chosen({"y": output}, hot).name == "multilabel-f1"


def test_the_user_may_say_what_has_answers() -> None:
    choice = chosen({"x": EMBEDDINGS, "y": LOGITS}, text="agreement:y")
    assert (choice.name, choice.output, choice.seen["y"].kind) == ("agreement:y", "y", OutputKind.CLASSES)
    asked = seen({"y": LOGITS}, asked=True)
    assert asked["y"].kind is OutputKind.CLASSES


def test_an_output_that_is_named_is_as_bounded_as_one_that_is_not() -> None:
    shares = np.exp(LOGITS) / np.exp(LOGITS).sum(axis=1, keepdims=True)
    for behind in (SOFTMAX, SIGMOID):
        assert chosen({"p": shares}, behind=behind, text="agreement:p").seen["p"].bounded
    assert not chosen({"p": LOGITS}, text="agreement:p").seen["p"].bounded


def test_where_nothing_has_answers_none_can_be_asked_to_agree() -> None:
    with pytest.raises(ConfigError, match=r"no output has answers.*y is number"):
        decisions.check_asked(seen({"y": LOGITS[:, :1]}, asked=True))
    decisions.check_asked(seen({"y": LOGITS}, asked=True))


def test_an_unknown_metric_or_output_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no metric 'top2'.*Known are agreement, .*top1"):
        metric.check("top2")
    with pytest.raises(ConfigError, match=r"no output 'z'.*It has y"):
        chosen({"y": LOGITS}, text="cosine:z")
    with pytest.raises(ConfigError, match=r"top1 needs labels"):
        chosen({"y": LOGITS}, text="top1:y")
    with pytest.raises(ConfigError, match=r"agreement judges: y \[40, 5\] is embedding.*--metric agreement:y"):
        chosen({"y": EMBEDDINGS}, text="agreement")


def test_every_known_metric_says_its_direction_and_finds_itself() -> None:
    for name, one in known().items():
        assert find(name, where="--metric") is one
        assert isinstance(one.direction, Direction)


def test_labels_without_class_scores_are_refused() -> None:
    with pytest.raises(DatasetError, match="output 'y' of shape 40x1 holds no class scores"):
        chosen({"y": LOGITS[:, :1]}, np.asarray(["cat"] * 40))


def test_the_users_metric_is_named_without_its_folder() -> None:
    assert chosen({"y": LOGITS}, text="/a/b/mine.py:f1").name == "mine.py:f1"


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (np.arange(40) % 5 + 1, "label holds 5, the model's 5 classes are 0 to 4"),
        (np.arange(40) % 5 - 1, "label holds -1"),
        (np.full(40, 0.5), "dtype float64"),
        (np.zeros((40, 2), int), "shape 40x2, 40 was expected"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels: Array, said: str) -> None:
    with pytest.raises(DatasetError, match=said):
        check_labels(labels, LOGITS, where="evaluation")
    with pytest.raises(DatasetError, match=said):
        chosen({"y": LOGITS}, labels)


@given(st.integers(1, 30), st.integers(2, 6), st.floats(0.1, 10))
def test_cosine_is_one_for_any_positive_multiple_and_minus_one_for_the_negative(
    rows: int, columns: int, factor: float
) -> None:
    values = np.random.default_rng(rows).normal(size=(rows, columns))
    choice = chosen({"y": values}, text="cosine")
    assert value(choice, {"y": values * factor}, {"y": values}) == pytest.approx(1.0)
    assert value(choice, {"y": -values}, {"y": values}) == pytest.approx(-1.0)


def test_cosine_is_of_the_output_that_suffers_most() -> None:
    a, b = RNG.normal(size=(9, 4)), RNG.normal(size=(9, 3))
    choice = chosen({"a": a, "b": b})
    assert value(choice, {"a": a, "b": -b}, {"a": a, "b": b}) == pytest.approx(-1.0)


def test_boxes_do_not_hide_scores() -> None:
    boxes, scores = RNG.random((6, 4, 50)) * 600, RNG.random((6, 20, 50)) ** 8
    reference = np.concatenate([boxes, scores], axis=1).astype(np.float32)
    lost = reference.copy()
    lost[:, 4:] = 0
    choice = chosen({"y": reference}, behind=GraphEvidence(sigmoid=True, mixed=True))
    assert choice.seen["y"].kind is OutputKind.BOXES
    assert value(choice, {"y": lost}, {"y": reference}) == 0.0
    whole = float(np.vdot(lost, reference) / np.linalg.norm(lost) / np.linalg.norm(reference))
    assert whole > 0.999


def test_cosine_of_zeros_and_of_nans() -> None:
    zero, one = np.zeros((1, 2)), np.ones((1, 2))
    choice = chosen({"y": one}, text="cosine")
    assert value(choice, {"y": zero}, {"y": zero}) == 1.0
    assert value(choice, {"y": zero}, {"y": one}) == 0.0
    assert value(choice, {"y": one * np.nan}, {"y": one}) == 0.0


def test_a_probability_is_held_against_a_threshold_that_divides_it() -> None:
    even, rare = np.linspace(0, 1, 101), np.linspace(0, 0.1, 101)
    assert decisions.threshold(even) == 0.5
    assert decisions.threshold(rare) == pytest.approx(0.09)
    choice = chosen({"p": rare[:, None]}, behind=SIGMOID)
    assert choice.name == "agreement"
    assert value(choice, {"p": np.zeros((101, 1))}, {"p": rare[:, None]}) == pytest.approx(0.9, abs=0.01)
