"""Detection: COCO's mean average precision of the boxes that the model's outputs decode to."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from kedge.evaluation.kinds import ClassifiedOutput
from kedge.evaluation.metrics.contract import Metric
from kedge_protocol.errors import ConfigError, DatasetError, InputError, MissingDependencyError
from kedge_protocol.packages import pip_install
from kedge_targets.pipeline import boxes
from kedge_targets.pipeline.boxes import Detections

Array = npt.NDArray[Any]

FIELDS = 6
"""Of a label: class, x1, y1, x2, y2 as shares of the picture's width and height, and 1 for a crowd. Rows of class -1
fill up."""
MOST = 100
"""Detections of one picture that count, as in COCO's protocol."""
THRESHOLDS = tuple(0.5 + 0.05 * step for step in range(10))
_RECALLS = np.linspace(0.0, 1.0, 101)
_PIXELS = 1000.0
"""pycocotools counts areas; with sides of this many pixels no box falls below its smallest one."""
_HEAD = 2


class MeanAveragePrecision(Metric):
    """Mean over classes and over overlaps from 0.50 to 0.95 of the average precision (COCO's ``AP``).

    pycocotools matches detections with labels picture by picture; the curve over any pictures follows from that, so
    intervals need no second run. Boxes are decoded by :mod:`kedge_targets.pipeline.boxes`.
    """

    name = "map"
    needs_labels = True
    whole = True
    span = None
    thresholds: ClassVar[tuple[float, ...]] = THRESHOLDS

    @classmethod
    def suits(cls, seen: ClassifiedOutput, reference: Array, labels: Any | None) -> bool:
        """Boxes as labels."""
        return is_boxes(labels)

    def check(self, reference: Mapping[str, Array], labels: Any | None, *, where: str) -> None:
        """Boxes as labels, and outputs that decode."""
        _pycocotools()
        if not is_boxes(labels):
            have = "x".join(map(str, np.asarray(labels).shape))
            raise DatasetError(
                f"label has shape {have}, boxes (NxMx{FIELDS}) were expected",
                where=where,
                remedy="Give COCO JSON or a folder of YOLO text files with --annotations",
            )
        try:
            head = boxes.head_of(reference)
        except InputError as error:
            raise ConfigError(error.what, where="--metric", remedy=error.remedy) from error
        known, highest = boxes.class_count(reference, head), int(np.asarray(labels)[..., 0].max(initial=0))
        if known is not None and highest >= known:
            raise DatasetError(
                f"label holds class {highest}, the model's {known} classes are 0 to {known - 1}",
                where=where,
                remedy="COCO's classes are numbered by the order of its categories' ids: leave out those that the "
                "model does not know",
            )

    def per_sample(self, outputs: Mapping[str, Array], reference: Mapping[str, Array], labels: Any | None) -> Array:
        """N x (classes + detections x (2 + thresholds)): objects of each class, then for each detection its score, its
        class, and for each threshold 1 where it hits, 0 where it does not, -1 where it does not count."""
        # The float model's outputs tell the head and the unit: a broken output must not change how boxes are read.
        head = boxes.head_of(reference)
        shares = boxes.in_shares(reference, head)
        found = boxes.decode(outputs, self.size, head=head, shares=shares, most=MOST)
        return matched(found, np.asarray(labels), self.thresholds)

    def aggregate(self, rows: Array) -> float:
        """The mean average precision over some pictures; 0 where they show nothing."""
        width = _HEAD + len(self.thresholds)
        classes = rows.shape[1] - MOST * width
        counts = rows[:, :classes].sum(axis=0)
        hits = rows[:, classes:].reshape(-1, width)
        hits = hits[hits[:, 1] >= 0]
        hits = hits[np.argsort(-hits[:, 0], kind="mergesort")]
        values = [
            _average_precision(hits[hits[:, 1] == one, _HEAD:], counts[one]) for one in range(classes) if counts[one]
        ]
        return round(float(np.mean(values)), 9) if values else 0.0

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the model's input."""
        picture = next((shape for shape in self.inputs.values() if len(shape) == 4), None)
        if picture is None:
            raise ConfigError("the model takes no pictures, so it has no boxes", where="--metric")
        _, first, second, third = picture
        height, width = (first, second) if third < first else (second, third)
        return width, height


class MeanAveragePrecision50(MeanAveragePrecision):
    """Mean over classes of the average precision at an overlap of 0.50 (COCO's ``AP50``, Pascal VOC's)."""

    name = "map50"
    thresholds = THRESHOLDS[:1]


def is_boxes(labels: Any | None) -> bool:
    """Whether labels are boxes: NxMx6 (see :data:`FIELDS`)."""
    return isinstance(labels, np.ndarray) and labels.ndim == 3 and labels.shape[2] == FIELDS


def matched(found: list[Detections], labels: Array, thresholds: tuple[float, ...]) -> Array:
    """What pycocotools makes of each picture; see :meth:`MeanAveragePrecision.per_sample`."""
    # A class without objects counts nothing; rows of one width let any two models' be joined.
    classes = 1 + int(labels[..., 0].max(initial=0))
    evaluated = _evaluated(found, labels, classes, thresholds)
    width = _HEAD + len(thresholds)
    counts = np.zeros((len(found), classes))
    rows = np.full((len(found), MOST, width), -1.0)
    filled = np.zeros(len(found), dtype=np.int64)
    for one in evaluated:
        if one is None:
            continue
        picture, kind = one["image_id"] - 1, one["category_id"]
        counts[picture, kind] = np.sum(np.asarray(one["gtIgnore"]) == 0)
        scores = np.asarray(one["dtScores"])
        part = rows[picture, filled[picture] : filled[picture] + len(scores)]
        part[:, 0], part[:, 1] = scores, kind
        hit, ignored = np.asarray(one["dtMatches"]) > 0, np.asarray(one["dtIgnore"], dtype=bool)
        part[:, _HEAD:] = np.where(ignored, -1.0, hit.astype(np.float64)).reshape(len(thresholds), -1).T
        filled[picture] += len(scores)
    return np.concatenate([counts, rows.reshape(len(found), -1)], axis=1)


def _evaluated(found: list[Detections], labels: Array, classes: int, thresholds: tuple[float, ...]) -> list[Any]:
    """pycocotools' matches, one dictionary for each picture and class (None where there is neither)."""
    coco, evaluation = _pycocotools()
    objects: list[dict[str, Any]] = []
    for number, rows in enumerate(labels, start=1):
        for kind, *corners, crowd in rows[rows[:, 0] >= 0]:
            objects.append(_object(len(objects) + 1, number, int(kind), np.asarray(corners)) | {"iscrowd": int(crowd)})
    detections: list[dict[str, Any]] = []
    for number, one in enumerate(found, start=1):
        for corners, score, kind in zip(one.boxes, one.scores, one.classes, strict=True):
            if kind >= classes:
                continue
            made = _object(len(detections) + 1, number, int(kind), corners)
            detections.append(made | {"score": float(score)})
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        sides = []
        for annotations in (objects, detections):
            side = coco()
            side.dataset = {
                "images": [{"id": number + 1} for number in range(len(found))],
                "categories": [{"id": kind} for kind in range(classes)],
                "annotations": annotations,
            }
            side.createIndex()
            sides.append(side)
        run = evaluation(*sides, iouType="bbox")
        run.params.iouThrs = np.asarray(thresholds)
        run.params.areaRng, run.params.areaRngLbl = [[0, 1e10]], ["all"]
        run.params.maxDets = [MOST]
        run.evaluate()
    evaluated: list[Any] = run.evalImgs
    return evaluated


def _object(number: int, picture: int, kind: int, corners: Array) -> dict[str, Any]:
    x1, y1, x2, y2 = (float(value) * _PIXELS for value in corners)
    box = [x1, y1, max(0.0, x2 - x1), max(0.0, y2 - y1)]
    return {"id": number, "image_id": picture, "category_id": kind, "bbox": box, "area": box[2] * box[3]}


def _average_precision(hits: Array, count: float) -> float:
    """Over the thresholds: the mean over 101 recalls of the best precision at that recall or a higher one.

    Args:
        hits: detections (best first) x thresholds; 1, 0, or -1 for what does not count.
        count: objects.
    """
    values = []
    for column in hits.T:
        counted = column[column >= 0]
        right = np.cumsum(counted)
        precision = right / np.arange(1, len(counted) + 1)
        # From the right: precision never falls towards lower recalls.
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        at = np.searchsorted(right / count, _RECALLS, side="left")
        values.append(np.where(at < len(envelope), np.append(envelope, 0.0)[np.minimum(at, len(envelope))], 0.0).mean())
    return float(np.mean(values)) if values else 0.0


def _pycocotools() -> tuple[Any, Any]:
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise MissingDependencyError(
            "mAP needs pycocotools", where="--metric", remedy=pip_install("metrics")
        ) from error
    return COCO, COCOeval


METRICS = (MeanAveragePrecision, MeanAveragePrecision50)
