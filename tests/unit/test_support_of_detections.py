"""What detectors are judged by in tests, judged itself: against pycocotools and by hand."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tests.support import detections
from tests.support.detections import Found

Array = npt.NDArray[Any]


def objects(rng: np.random.Generator, count: int) -> Found:
    corner = rng.uniform(0, 80, (count, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(5, 40, (count, 2))], axis=1)
    return Found(boxes, np.ones(count), rng.integers(0, 3, count))


def shaken(rng: np.random.Generator, truth: Found) -> Found:
    """Some lost, some moved, some invented."""
    kept = rng.random(len(truth.boxes)) < 0.8
    more = objects(rng, int(rng.integers(0, 3)))
    boxes = np.concatenate([truth.boxes[kept] + rng.normal(0, 2, (kept.sum(), 4)), more.boxes])
    classes = np.concatenate([truth.classes[kept], more.classes])
    scores = rng.random(len(boxes))
    order = np.argsort(-scores)
    return Found(boxes[order], scores[order], classes[order])


def test_the_mean_average_precision_is_that_of_pycocotools(monkeypatch: pytest.MonkeyPatch) -> None:
    from pycocotools import cocoeval

    rng = np.random.default_rng(0)
    truth = [objects(rng, int(rng.integers(0, 6))) for _ in range(40)]
    got = [shaken(rng, one) for one in truth]
    made: list[Any] = []
    evaluate = cocoeval.COCOeval.evaluate
    monkeypatch.setattr(cocoeval.COCOeval, "evaluate", lambda self: (made.append(self), evaluate(self))[1])
    found = detections.precisions(truth, got, 3)
    with contextlib.redirect_stdout(io.StringIO()):
        made[0].accumulate()
        made[0].summarize()
    assert found.mean() == pytest.approx(made[0].stats[0], abs=1e-9)
    assert 0.1 < found.mean() < 0.9


def test_a_worse_detector_is_told_apart_and_an_equal_one_is_not() -> None:
    rng = np.random.default_rng(1)
    truth = [objects(rng, 4) for _ in range(60)]
    good = detections.precisions(truth, truth, 3)
    bad = detections.precisions(truth, [shaken(rng, one) for one in truth], 3)
    assert good.mean() == pytest.approx(1.0)
    assert detections.paired_interval(good, good, resamples=20)[1:] == (0, 0)
    loss, low, high = detections.paired_interval(good, bad, resamples=50)
    assert 0 < low <= loss <= high


def test_of_boxes_that_lie_over_one_another_the_best_of_each_class_is_kept() -> None:
    output = np.zeros((6, 4), np.float32)
    output[:4] = np.array([[50, 50, 20, 20], [51, 50, 20, 20], [51, 50, 20, 20], [90, 90, 8, 8]]).T
    output[4] = [0.9, 0.8, 0.0, 0.3]
    output[5] = [0.0, 0.0, 0.7, 0.1]
    found = detections.decoded(output)
    assert list(zip(found.classes, found.scores.round(2), strict=True)) == [
        (0, np.float32(0.9)),
        (1, np.float32(0.7)),
        (0, np.float32(0.3)),
    ]
    assert found.boxes[0].tolist() == [40, 40, 60, 60]


def test_f1_counts_what_is_lost_and_what_is_invented() -> None:
    two = Found(np.array([[0, 0, 10, 10], [50, 50, 60, 60]], float), np.ones(2), np.array([0, 1]))
    one = Found(two.boxes[:1], two.scores[:1], two.classes[:1])
    wrong = Found(two.boxes, two.scores, np.array([0, 0]))
    assert detections.f1([two], [two]) == 1
    assert detections.f1([two], [one]) == pytest.approx(2 / 3)
    assert detections.f1([two], [wrong]) == pytest.approx(0.5)
