"""Detections of YOLOv8-like outputs, decoded and compared here, with nothing of Kedge's: what its own decoding and
metrics are held against."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

SCORE = 0.25
OVERLAP = 0.5
_SAME = 0.45
"""Overlap from which on the weaker of two boxes of one class goes."""


@dataclass(frozen=True)
class Found:
    """Of one picture: boxes N x 4 (left, top, right, bottom, in pixels), scores N, classes N; best first."""

    boxes: Array
    scores: Array
    classes: Array


def decoded(output: Array, *, score: float = SCORE, same: float = _SAME, most: int = 300) -> Found:
    """Of one picture's output, (4 + classes) x anchors: centre, width and height in pixels, a score for each class."""
    scores, classes = output[4:].max(axis=0), output[4:].argmax(axis=0)
    chosen = np.flatnonzero(scores >= score)
    chosen = chosen[np.argsort(-scores[chosen], kind="stable")]
    x, y, width, height = output[:4, chosen]
    boxes = np.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], axis=1)
    kept: list[int] = []
    alive = np.ones(len(chosen), dtype=bool)
    for index in range(len(chosen)):
        if not alive[index]:
            continue
        kept.append(index)
        same_class = classes[chosen] == classes[chosen[index]]
        alive &= ~(same_class & (overlaps(boxes[index : index + 1], boxes)[0] > same))
    kept = kept[:most]
    return Found(boxes[kept], scores[chosen][kept], classes[chosen][kept])


def overlaps(first: Array, second: Array) -> Array:
    """Intersection over union of each box with each: N x M."""
    least = np.maximum(first[:, None, :2], second[None, :, :2])
    most = np.minimum(first[:, None, 2:], second[None, :, 2:])
    both = np.clip(most - least, 0, None).prod(axis=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (first, second)]
    union = areas[0][:, None] + areas[1][None, :] - both
    return np.asarray(np.where(union > 0, both / np.where(union > 0, union, 1), 0.0))


def matched(wanted: Found, got: Found) -> int:
    """How many boxes have a partner of their class with :data:`OVERLAP` of overlap; the best scores choose first."""
    free = np.ones(len(wanted.boxes), dtype=bool)
    count = 0
    for box, kind in zip(got.boxes, got.classes, strict=True):
        over = np.where(free & (wanted.classes == kind), overlaps(box[None], wanted.boxes)[0], 0.0)
        if over.size and over.max() >= OVERLAP:
            free[over.argmax()] = False
            count += 1
    return count


def f1(wanted: Sequence[Found], got: Sequence[Found]) -> float:
    """Of detections against those of another model, over all pictures."""
    hits = sum(matched(*pair) for pair in zip(wanted, got, strict=True))
    total = sum(len(one.boxes) for one in (*wanted, *got))
    return 2 * hits / total if total else 1.0


@dataclass(frozen=True)
class Precisions:
    """What pycocotools found, kept by picture, so that any choice of pictures has its mean average precision.

    Attributes:
        rows: for each picture and class: scores, hits (one row for each overlap of 0.50 to 0.95), objects.
    """

    rows: list[list[tuple[Array, Array, int]]]

    def mean(self, pictures: Array | None = None) -> float:
        """COCO's AP 50-95 over these pictures (indices, repeated ones count again), 101 recalls."""
        chosen = range(len(self.rows)) if pictures is None else pictures
        found = [_averages([self.rows[i][kind] for i in chosen]) for kind in range(len(self.rows[0]))]
        known = [one for one in found if one is not None]
        return float(np.mean(known)) if known else 0.0


def precisions(truth: Sequence[Found], got: Sequence[Found], classes: int) -> Precisions:
    """Match by pycocotools.

    Args:
        truth: boxes and classes; scores are not read.
        got: decoded with a low threshold of score, else recall ends early.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def entry(box: Array, kind: int, image: int, number: int, **more: Any) -> dict[str, Any]:
        left, top, right, bottom = (float(end) for end in box)
        size = {"bbox": [left, top, right - left, bottom - top], "area": (right - left) * (bottom - top)}
        return {"id": number, "image_id": image, "category_id": int(kind), "iscrowd": 0, **size, **more}

    known, seen = COCO(), []
    objects = [(i, box, kind) for i, one in enumerate(truth) for box, kind in zip(one.boxes, one.classes, strict=True)]
    known.dataset = {
        "images": [{"id": i} for i in range(len(truth))],
        "categories": [{"id": kind} for kind in range(classes)],
        "annotations": [entry(box, kind, i, number + 1) for number, (i, box, kind) in enumerate(objects)],
    }
    for i, one in enumerate(got):
        for box, kind, score in zip(one.boxes, one.classes, one.scores, strict=True):
            seen.append(entry(box, kind, i, len(seen) + 1, score=float(score)))
    with contextlib.redirect_stdout(io.StringIO()):
        known.createIndex()
        evaluation = COCOeval(known, known.loadRes(seen) if seen else COCO(), "bbox")
        evaluation.evaluate()
    rows: list[list[tuple[Array, Array, int]]] = [
        [(np.zeros(0), np.zeros((10, 0), dtype=bool), 0) for _ in range(classes)] for _ in truth
    ]
    whole = tuple(evaluation.params.areaRng[0])
    for one in evaluation.evalImgs:
        if one is None or tuple(one["aRng"]) != whole:
            continue
        hits = np.asarray(one["dtMatches"]) > 0
        rows[one["image_id"]][one["category_id"]] = np.asarray(one["dtScores"]), hits, len(one["gtIds"])
    return Precisions(rows)


def _averages(rows: Sequence[tuple[Array, Array, int]]) -> float | None:
    """The mean over overlaps of one class's average precision; None where it has no object."""
    objects = sum(row[2] for row in rows)
    if not objects:
        return None
    order = np.argsort(-np.concatenate([row[0] for row in rows]), kind="mergesort")
    hits = np.concatenate([row[1] for row in rows], axis=1)[:, order]
    true = hits.cumsum(axis=1)
    recall, precision = true / objects, true / np.arange(1, hits.shape[1] + 1)
    found = []
    for at, height in zip(recall, precision, strict=True):
        envelope = np.maximum.accumulate(height[::-1])[::-1]
        places = np.searchsorted(at, np.linspace(0, 1, 101), side="left")
        found.append(np.where(places < len(at), np.append(envelope, 0.0)[np.minimum(places, len(at))], 0.0).mean())
    return float(np.mean(found))


def paired_interval(
    first: Precisions, second: Precisions, *, resamples: int = 300, seed: int = 0
) -> tuple[float, float, float]:
    """The first's mean average precision minus the second's, and the ends of its 95 % interval over pictures."""
    rng = np.random.default_rng(seed)
    count = len(first.rows)
    drawn = [rng.integers(0, count, count) for _ in range(resamples)]
    differences = [first.mean(one) - second.mean(one) for one in drawn]
    low, high = np.quantile(differences, [0.025, 0.975])
    return first.mean() - second.mean(), float(low), float(high)
