"""No output hides behind the first: without labels the worst counts, with labels the one that they are of."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kedge.evaluation import confidence_intervals, kinds, metric
from kedge.evaluation.kinds import GraphEvidence
from kedge.search import held_back

Array = npt.NDArray[Any]

RNG = np.random.default_rng(7)
COUNT = 300
SOFTMAX, SIGMOID, NOTHING = GraphEvidence(distribution=True, sigmoid=True), GraphEvidence(sigmoid=True), GraphEvidence()


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return np.asarray(e / e.sum(axis=1, keepdims=True), dtype=np.float32)


def chosen(
    outputs: dict[str, Array], text: str | None = None, *, behind: GraphEvidence, labels: Array | None = None
) -> metric.Choice:
    seen = kinds.classify_outputs(
        outputs, graph=dict.fromkeys(outputs, behind), inputs={}, labels=labels, named=metric.named_output(text)
    )
    return metric.choose(text, kinds=seen, reference=outputs, labels=labels)


def scored(choice: metric.Choice, outputs: dict[str, Array], float_: dict[str, Array], labels: Any = None) -> Any:
    return metric.score(choice, outputs, float_, {}, labels)


def test_answers_of_a_second_output_that_flip_are_a_drop() -> None:
    """Every tenth answer of the second head flips; the first head, and the floor, see nothing of it."""
    float_ = {"a": softmax(RNG.normal(0, 2, (COUNT, 4))), "b": softmax(RNG.normal(0, 2, (COUNT, 5)))}
    broken = {"a": float_["a"], "b": float_["b"].copy()}
    broken["b"][::10] = np.roll(float_["b"][::10], 1, axis=1)
    choice = chosen(float_, behind=SOFTMAX)
    assert (choice.name, choice.output, choice.outputs) == ("agreement", None, ("a", "b"))
    wanted, got = scored(choice, float_, float_), scored(choice, broken, float_)
    assert (wanted.value, got.value) == (1.0, 0.9)
    interval = confidence_intervals.of_drop(choice, wanted, got)
    assert interval is not None
    assert (interval.lost, interval.won) == (30, 0)
    assert interval.low < 0.1 < interval.high
    part = held_back.within(choice, got, np.arange(100))
    assert part.value == 0.9
    assert scored(chosen(float_, "agreement:a", behind=SOFTMAX), broken, float_).value == 1.0


@pytest.mark.parametrize(
    ("kind", "behind", "worse"),
    [("sqnr", NOTHING, -100), ("mae", NOTHING, 0.01), ("mse", NOTHING, 0.001), ("r2", NOTHING, -0.01),
     ("spearman", NOTHING, -0.001), ("agreement", SIGMOID, -0.02)],
)  # fmt: skip
def test_without_labels_the_worst_output_counts(kind: str, behind: GraphEvidence, worse: float) -> None:
    rows = RNG.random((COUNT, 1)), RNG.random((COUNT, 1))
    float_ = {"a": rows[0].astype(np.float32), "b": rows[1].astype(np.float32)}
    for name in float_:
        broken = {**float_, name: float_[name] + RNG.normal(0, 0.15, (COUNT, 1)).astype(np.float32)}
        choice = chosen(float_, kind, behind=behind)
        wanted, got = scored(choice, float_, float_), scored(choice, broken, float_)
        assert (got.value - wanted.value) * np.sign(worse) > abs(worse)
        assert got.value == scored(chosen(float_, f"{kind}:{name}", behind=behind), broken, float_).value
        interval = confidence_intervals.of_drop(choice, wanted, got)
        assert interval is not None
        assert interval.low <= choice.drop(wanted.value, got.value) <= interval.high


@pytest.mark.parametrize("kind", ["mae", "mse", "r2", "spearman", "auc", "f1", "top1"])
def test_labels_are_of_the_output_that_is_nearest_to_them(kind: str) -> None:
    outputs = {name: RNG.random((COUNT, 1)).astype(np.float32) for name in ("a", "b", "c")}
    decided = kind in ("auc", "f1", "top1")
    labels = (outputs["b"][:, 0] > 0.5).astype(np.int64) if decided else outputs["b"][:, 0] + RNG.normal(0, 0.1, COUNT)
    assert chosen(outputs, kind, behind=SIGMOID if decided else NOTHING, labels=labels).output == "b"


def test_class_numbers_beside_their_scores_do_not_count_twice() -> None:
    scores = softmax(RNG.normal(0, 2, (COUNT, 4)))
    outputs = {"label": scores.argmax(axis=1), "scores": scores}
    assert chosen(outputs, behind=SOFTMAX).output == "scores"
    assert chosen({"label": outputs["label"]}, behind=NOTHING).output == "label"
