"""The field's metrics, each held against a library that has it or against values worked out by hand."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import f1_score, jaccard_score, mean_absolute_error, mean_squared_error, roc_auc_score

from kedge.evaluation.kinds import ClassifiedOutput, OutputKind
from kedge.evaluation.metrics import find
from kedge.evaluation.metrics.detection import FIELDS
from kedge_protocol.errors import ConfigError, DatasetError
from kedge_targets.pipeline.boxes import Detections, decode, iou, suppress

Array = np.ndarray[Any, Any]


def made(name: str, kind: OutputKind = OutputKind.VALUES, **inputs: Any) -> Any:
    """A metric of the output ``y``."""
    metric = find(name, where="test")
    seen = {"y": ClassifiedOutput(name="y", kind=kind, why="the test says so")}
    return metric(None if metric.whole else "y", seen, inputs.get("inputs"))


def value(name: str, answers: Array, labels: Array | None, reference: Array | None = None, **options: Any) -> float:
    """Its value."""
    wanted = {"y": answers if reference is None else reference}
    metric = made(name, **options)
    metric.check(wanted, labels, where="test")
    return float(metric.value({"y": answers}, wanted, labels))


@pytest.mark.parametrize("seed", range(4))
def test_classification_is_what_scikit_learn_says(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.random((60, 7)).round(1)  # with ties
    labels = rng.integers(0, 7, 60)
    kind = {"kind": OutputKind.CLASSES}
    assert value("f1", scores, labels, **kind) == pytest.approx(f1_score(labels, scores.argmax(1), average="macro"))
    wanted = roc_auc_score(labels, scores / scores.sum(1, keepdims=True), multi_class="ovr")
    assert value("auc", scores / scores.sum(1, keepdims=True), labels, **kind) == pytest.approx(wanted)
    hot = rng.integers(0, 2, (60, 7))
    assert value("multilabel-f1", scores, hot) == pytest.approx(f1_score(hot, scores > 0.5, average="micro"))
    assert value("multilabel-f1", scores - 0.5, hot) == pytest.approx(f1_score(hot, scores > 0.5, average="micro"))
    one = rng.integers(0, 2, 60)
    assert value("auc", scores[:, 0], one, kind=OutputKind.NUMBER) == pytest.approx(roc_auc_score(one, scores[:, 0]))
    best = np.argsort(-scores + rng.random(scores.shape) * 1e-6, axis=1)[:, :5]
    exact = scores - np.arange(7) * 1e-9
    best = np.argsort(-exact, axis=1)[:, :5]
    assert value("top5", exact, labels, **kind) == pytest.approx(float(np.mean((best == labels[:, None]).any(1))))


@pytest.mark.parametrize("seed", range(3))
def test_regression_is_what_the_libraries_say(seed: int) -> None:
    rng = np.random.default_rng(seed)
    wanted = rng.normal(size=(50, 3))
    got = wanted + rng.normal(size=(50, 3)) / 10
    assert value("mae", got, wanted) == pytest.approx(mean_absolute_error(wanted, got))
    assert value("mse", got, None, reference=wanted) == pytest.approx(mean_squared_error(wanted, got))
    assert value("sqnr", got, None, reference=wanted) == pytest.approx(
        10 * np.log10((wanted**2).sum() / ((got - wanted) ** 2).sum()), abs=1e-5
    )
    left, right = wanted[:, :1].round(1), got[:, :1].round(1)
    assert value("spearman", left, right, kind=OutputKind.NUMBER) == pytest.approx(spearmanr(left, right)[0])
    assert made("mae").direction.value == "lower"
    broken = got.copy()
    broken[3, 1] = np.nan
    assert value("mse", broken, wanted) > 1e30
    assert value("sqnr", wanted, None, reference=wanted) == 200


def test_masks_are_judged_by_the_classes_that_occur_and_without_what_is_to_be_ignored() -> None:
    rng = np.random.default_rng(0)
    masks = rng.integers(0, 3, (4, 6, 5))
    scores = rng.random((4, 4, 6, 5))
    wanted = jaccard_score(masks.ravel(), scores.argmax(1).ravel(), average="macro", labels=[0, 1, 2, 3])
    assert value("miou", scores, masks) == pytest.approx(wanted)
    assert value("miou", scores.transpose(0, 2, 3, 1), masks) == pytest.approx(wanted)
    ignored = masks.copy()
    ignored[scores.argmax(1) != masks] = 255
    perfect = np.eye(4)[masks].transpose(0, 3, 1, 2)
    assert value("miou", perfect, masks) == 1
    assert value("miou", scores, ignored) == 1
    single = rng.random((4, 1, 6, 5))
    yes = (masks > 1).astype(np.int64)
    assert value("miou", single, yes) == pytest.approx(
        jaccard_score(yes.ravel(), single.ravel() > 0.5, average="macro", labels=[0, 1])
    )
    with pytest.raises(DatasetError, match="label holds 9"):
        value("miou", scores, np.full((4, 6, 5), 9))


def test_error_rates_count_edits_of_characters_and_words_and_collapse_ctc_paths() -> None:
    got, wanted = np.asarray(["the cat sat", "dog"]), np.asarray(["the cat sits", "dog"])
    assert value("wer", got, wanted) == pytest.approx(1 / 4)
    assert value("cer", got, wanted) == pytest.approx(2 / 15)
    paths = np.asarray([[1, 1, 0, 1, 2], [3, 0, 0, 3, 3]])
    scores = np.eye(4)[paths]
    assert value("cer", scores, np.asarray([[1, 1, 2], [3, 3, 0]])) == 0
    assert value("cer", scores, np.asarray([[1, 2, 0], [3, 3, 0]])) == pytest.approx(1 / 4)
    with pytest.raises(DatasetError, match="no words"):
        value("wer", scores, np.asarray([[1, 1, 2], [3, 3, 0]]))


def test_what_cannot_be_wrong_or_does_not_fit_is_refused() -> None:
    three = np.random.default_rng(0).random((4, 3))
    for name, labels, error, text in (
        ("top5", np.asarray([0, 1, 2, 0]), DatasetError, "always hold"),
        ("f1", np.asarray([0, 1, 2, 3]), DatasetError, "label holds 3"),
        ("auc", np.asarray([1, 1, 1, 1]), DatasetError, "all labels are alike"),
        ("multilabel-f1", np.full((4, 3), 2), DatasetError, "other numbers"),
        ("mae", np.zeros((4, 2)), DatasetError, "label has shape 4x2"),
        ("spearman", None, ConfigError, "no order"),
        ("map", np.zeros((4, 3)), DatasetError, "boxes"),
    ):
        with pytest.raises(error, match=text):
            value(name, three, labels, kind=OutputKind.CLASSES)


def drawn(rng: Any, pictures: int, classes: int) -> tuple[Array, Array]:
    """Labels, and a YOLO head's output [N, 4 + C, A] that finds most of them."""
    labels = np.zeros((pictures, 5, FIELDS), dtype=np.float32)
    labels[..., 0] = -1
    output = np.zeros((pictures, 4 + classes, 40), dtype=np.float32)
    for picture in range(pictures):
        for number in range(int(rng.integers(0, 6))):
            low, side = rng.random(2) * 0.7, 0.1 + rng.random(2) * 0.2
            kind = int(rng.integers(classes))
            labels[picture, number] = (kind, *low, *(low + side), rng.random() < 0.1)
            moved = low + rng.normal(size=2) * 0.02
            centre = np.concatenate([(moved + side / 2) * 64, side * 64])
            for copy in range(2):
                anchor = number * 2 + copy
                output[picture, :4, anchor] = centre + copy
                guess = kind if rng.random() < 0.8 else int(rng.integers(classes))
                output[picture, 4 + guess, anchor] = rng.random()
        output[picture, :4, 10:] = rng.random((4, 30)) * 30 + 5
        output[picture, 4:, 10:] = rng.random((classes, 30)) * 0.3
    return labels, output


def by_pycocotools(found: list[Detections], labels: Array) -> tuple[float, float]:
    """AP and AP50 by pycocotools' own accumulation, for boxes on a picture of 1000 x 1000."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    objects = [
        {
            "id": 1 + picture * 100 + number,
            "image_id": picture,
            "category_id": int(kind),
            "bbox": [x1 * 1e3, y1 * 1e3, (x2 - x1) * 1e3, (y2 - y1) * 1e3],
            "area": (x2 - x1) * (y2 - y1) * 1e6,
            "iscrowd": int(crowd),
        }
        for picture, rows in enumerate(labels.astype(float))
        for number, (kind, x1, y1, x2, y2, crowd) in enumerate(rows)
        if kind >= 0
    ]
    detections = [
        {
            "image_id": picture,
            "category_id": int(kind),
            "bbox": [x1 * 1e3, y1 * 1e3, (x2 - x1) * 1e3, (y2 - y1) * 1e3],
            "score": float(score),
        }
        for picture, one in enumerate(found)
        for (x1, y1, x2, y2), score, kind in zip(one.boxes.astype(float), one.scores, one.classes, strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        kinds = sorted({one["category_id"] for one in objects + detections})
        truth.dataset = {
            "info": {},
            "images": [{"id": number} for number in range(len(labels))],
            "categories": [{"id": one} for one in kinds],
            "annotations": objects,
        }
        truth.createIndex()
        run = COCOeval(truth, truth.loadRes(detections), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return float(run.stats[0]), float(run.stats[1])


@pytest.mark.parametrize(
    "shapes", [{"y": (1, 6, 40)}, {"y": (1, 40, 7)}, {"b": (1, 40, 4), "s": (1, 40, 3)}], ids=["v8", "v5", "ssd"]
)
def test_boxes_of_a_class_that_the_model_does_not_know_are_refused(shapes: dict[str, tuple[int, ...]]) -> None:
    outputs = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    for kind in (1, 2):
        labels = np.asarray([[[kind, 0.1, 0.1, 0.5, 0.5, 0]]], dtype=np.float32)
        if kind == 1:
            made("map").check(outputs, labels, where="test")
            continue
        with pytest.raises(DatasetError, match="class 2, the model's 2 classes are 0 to 1"):
            made("map").check(outputs, labels, where="test")


@pytest.mark.parametrize("seed", range(5))
def test_mean_average_precision_is_what_pycocotools_says(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels, output = drawn(rng, 12, 3)
    found = decode({"y": output}, (64, 64), most=100)
    whole, half = by_pycocotools(found, labels)
    assert 0.05 < whole < half < 1
    inputs = {"x": (None, 3, 64, 64)}
    assert value("map", output, labels, inputs=inputs) == pytest.approx(whole, abs=1e-6)
    assert value("map50", output, labels, inputs=inputs) == pytest.approx(half, abs=1e-6)
    # Over a part of the pictures too, from the same rows.
    metric = made("map", inputs=inputs)
    rows = metric.per_sample({"y": output}, {"y": output}, labels)
    part = np.asarray([1, 2, 5, 7, 11])
    wanted, _ = by_pycocotools([found[one] for one in part], labels[part])
    assert metric.aggregate(rows[part]) == pytest.approx(wanted, abs=1e-6)
    # The scores gone, the boxes whole: nothing is found.
    blind = output.copy()
    blind[:, 4:] = 0
    assert metric.value({"y": blind}, {"y": output}, labels) == 0
    # Boxes that shrank to shares of the picture are wrong, since the float model's are in pixels.
    shrunk = output.copy()
    shrunk[:, :4] /= 64
    assert metric.value({"y": shrunk}, {"y": output}, labels) == 0


@given(seed=st.integers(0, 10_000), count=st.integers(0, 30))
def test_suppression_keeps_the_best_and_no_two_that_overlap(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    low = rng.random((count, 2))
    boxes = np.concatenate([low, low + rng.random((count, 2))], axis=1)
    scores, classes = rng.random(count).round(1), rng.integers(0, 2, count)
    kept = suppress(boxes, scores, classes, iou_limit=0.5)
    assert np.all(np.diff(scores[kept]) <= 0)
    overlap = iou(boxes, boxes)
    for left in range(count):
        rivals = [right for right in kept if right != left and classes[right] == classes[left]]
        crowded = any(overlap[left, right] > 0.5 and scores[right] >= scores[left] for right in rivals)
        assert (left in kept and not any(overlap[left, right] > 0.5 for right in rivals)) or crowded


def test_the_usual_heads_decode_to_the_same_boxes() -> None:
    corners = np.asarray([[0.1, 0.2, 0.5, 0.6], [0.5, 0.5, 0.9, 0.9]], dtype=np.float32)
    centred = np.concatenate([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], axis=1)
    scores = np.asarray([[0.9, 0.1, 0.0], [0.2, 0.3, 0.8]], dtype=np.float32)
    fill = np.zeros((8, 7), dtype=np.float32)
    rows = np.concatenate([np.concatenate([centred * 100, scores], axis=1), fill])
    sure = np.ones((len(rows), 1), dtype=np.float32)
    background = np.zeros((2, 1), dtype=np.float32)
    heads = (
        {"y": rows.T[None]},
        {"y": np.concatenate([rows[:, :4], sure, rows[:, 4:]], axis=1)[None]},
        {"boxes": corners[None], "scores": np.concatenate([background, scores], axis=1)[None]},
        {
            "detection_boxes": corners[None][..., [1, 0, 3, 2]],
            "detection_classes": np.asarray([[0.0, 2.0]]),
            "detection_scores": np.asarray([[0.9, 0.8]]),
        },
    )
    for outputs in heads:
        (found,) = decode(outputs, (100, 100))
        np.testing.assert_allclose(found.boxes, corners, atol=1e-6)
        np.testing.assert_allclose(found.scores, [0.9, 0.8], atol=1e-6)
        assert found.classes.tolist() == [0, 2]
