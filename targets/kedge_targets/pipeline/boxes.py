"""Gets boxes from a detector's outputs: decodes the usual heads and applies non-maximum suppression.

Everything here uses only numpy, so that host and device get the same boxes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.bundle.pipeline import Head as Head
from kedge_protocol.errors import InputError

Array = npt.NDArray[Any]
Float = npt.NDArray[np.float32]

SCORE_FLOOR = 0.001
"""Detections below this score are dropped; it is low because COCO mAP also counts uncertain detections."""
IOU_LIMIT = 0.7
"""If two boxes of one class overlap by more than this, the one with the smaller score is dropped."""
MAX_DETECTIONS = 300
_BOX = 4
_SUPPRESSED = (Head.FINAL, Head.ROWS)
"""Heads that never give two boxes for one object."""
_NORMALIZED = 2.0
"""Coordinates that never exceed this are fractions of the picture's size, not pixels."""


@dataclass(frozen=True)
class Detections:
    """Objects found in one picture, best first.

    Attributes:
        boxes: ``[D, 4]`` as x1, y1, x2, y2, fractions of the picture's width and height.
        scores: ``[D]`` from 0 to 1.
        classes: ``[D]``, counted from 0.
    """

    boxes: Float
    scores: Float
    classes: npt.NDArray[np.int64]


def head_of(outputs: Mapping[str, Array]) -> Head:
    """Return the head that matches the outputs' shapes.

    Args:
        outputs: output name → array with one picture per entry of the first axis.

    Raises:
        InputError: the outputs match no head.
    """
    shapes = {name: array.shape for name, array in outputs.items()}
    if len(outputs) == 1:
        ((_, shape),) = shapes.items()
        if len(shape) == 3 and min(shape[1:]) > _BOX:
            return Head.ANCHOR_FREE if shape[1] < shape[2] else Head.OBJECTNESS
    else:
        if _ssd_names(outputs) is not None:
            return Head.SSD
        boxes = [shape for shape in shapes.values() if len(shape) == 3 and shape[2] == _BOX]
        flat = [shape for shape in shapes.values() if len(shape) == 2]
        if len(boxes) == 1 and len([shape for shape in flat if shape[1] == boxes[0][1]]) >= 2:
            return Head.FINAL
    listed = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
    raise InputError(
        f"the outputs are no detector's: {listed}",
        remedy="Known heads: one output Nx(4+C)xA or NxAx(5+C); boxes NxAx4 with scores NxAxC; boxes NxDx4 with classes"
        " and scores NxD",
    )


def class_count(outputs: Mapping[str, Array], head: Head) -> int | None:
    """Return how many classes a head scores; None where it gives class numbers itself."""
    shapes = {name: array.shape for name, array in outputs.items()}
    if head is Head.SSD:
        names = _ssd_names(outputs)
        return None if names is None else int(shapes[names[1]][2]) - 1  # the first is the background
    (shape, *_) = shapes.values()
    if head is Head.ANCHOR_FREE:
        return int(shape[1]) - _BOX
    return int(shape[2]) - _BOX - 1 if head is Head.OBJECTNESS else None


def decode(
    outputs: Mapping[str, Array],
    size: tuple[int, int],
    *,
    head: Head | None = None,
    shares: bool | None = None,
    score_floor: float = SCORE_FLOOR,
    iou_limit: float = IOU_LIMIT,
    most: int = MAX_DETECTIONS,
) -> list[Detections]:
    """Decode a detector's outputs into objects, picture by picture.

    Args:
        outputs: output name → array with one picture per entry of the first axis.
        size: width and height of the model's input, in pixels.
        head: the head; None to recognize it by the outputs' shapes.
        shares: whether boxes are fractions of the picture's size, not pixels; None to ask :func:`in_shares`.
        score_floor: detections with a lower score are dropped.
        iou_limit: as in :func:`suppress`.
        most: the maximum number of detections kept per picture.

    Raises:
        InputError: the outputs match no known head.
    """
    kind = head or head_of(outputs)
    read = _READERS[kind]
    raw = read(outputs)
    unit = _unit(raw) if shares is None else shares
    scale = np.ones(_BOX, np.float32) if unit else np.asarray([*size, *size], dtype=np.float32)
    found = []
    for corners, scores, classes in raw:
        boxes = corners / scale
        # NaN is no detection; it compares false.
        above = (scores >= score_floor) & np.isfinite(boxes).all(axis=1)
        boxes, scores, classes = boxes[above], scores[above], classes[above]
        if kind not in _SUPPRESSED:
            kept = suppress(boxes, scores, classes, iou_limit=iou_limit, most=most)
        else:
            kept = np.argsort(-scores, kind="stable")[:most]
        found.append(Detections(boxes[kept], scores[kept], classes[kept]))
    return found


def in_shares(outputs: Mapping[str, Array], head: Head | None = None) -> bool:
    """Return whether boxes are fractions of the picture's size, not pixels: none of their coordinates exceeds 2.

    Args:
        outputs: as for :func:`decode`; from many pictures, or from a model known to be correct.
    """
    return _unit(_READERS[head or head_of(outputs)](outputs))


def suppress(
    boxes: Array, scores: Array, classes: Array, *, iou_limit: float = IOU_LIMIT, most: int = MAX_DETECTIONS
) -> npt.NDArray[np.int64]:
    """Apply greedy non-maximum suppression within each class.

    Args:
        boxes: ``[D, 4]`` as x1, y1, x2, y2.
        scores: ``[D]``.
        classes: ``[D]``.
        iou_limit: a box is dropped if its overlap (intersection over union) with a better one of its class is larger.
        most: the maximum number of boxes kept.

    Returns:
        The indices of the boxes kept, best first.
    """
    order = np.argsort(-scores, kind="stable")
    kept: list[int] = []
    while order.size and len(kept) < most:
        best, rest = order[0], order[1:]
        kept.append(int(best))
        overlap = iou(boxes[best : best + 1], boxes[rest])[0]
        order = rest[(classes[rest] != classes[best]) | (overlap <= iou_limit)]
    return np.asarray(kept, dtype=np.int64)


def iou(left: Array, right: Array) -> Array:
    """Return the intersection over union of each of ``left`` ``[L, 4]`` with each of ``right`` ``[R, 4]``, as x1, y1,
    x2, y2: ``[L, R]``; 0 if a box has no area."""
    low = np.maximum(left[:, None, :2], right[None, :, :2])
    high = np.minimum(left[:, None, 2:], right[None, :, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=2)
    union = _area(left)[:, None] + _area(right)[None, :] - shared
    overlap: Array = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return overlap


def _area(boxes: Array) -> Array:
    area: Array = np.prod(np.clip(boxes[:, 2:] - boxes[:, :2], 0, None), axis=1)
    return area


_Raw = list[tuple[Float, Float, npt.NDArray[np.int64]]]


def _anchor_free(outputs: Mapping[str, Array]) -> _Raw:
    (array,) = outputs.values()
    rows = np.asarray(array, dtype=np.float32).transpose(0, 2, 1)
    return [_best_class(one[:, :_BOX], one[:, _BOX:]) for one in rows]


def _objectness(outputs: Mapping[str, Array]) -> _Raw:
    (array,) = outputs.values()
    rows = np.asarray(array, dtype=np.float32)
    return [_best_class(one[:, :_BOX], one[:, _BOX + 1 :] * one[:, _BOX : _BOX + 1]) for one in rows]


def _best_class(centred: Float, probabilities: Float) -> tuple[Float, Float, Any]:
    boxes = np.concatenate([centred[:, :2] - centred[:, 2:] / 2, centred[:, :2] + centred[:, 2:] / 2], axis=1)
    return boxes, probabilities.max(axis=1), probabilities.argmax(axis=1)


def _ssd(outputs: Mapping[str, Array]) -> _Raw:
    names = _ssd_names(outputs)
    if names is None:
        raise InputError("the outputs are no boxes NxAx4 with scores NxAxC")
    boxes, scores = (np.asarray(outputs[name], np.float32) for name in names)
    found = []
    for corners, rows in zip(boxes, scores, strict=True):
        classes = rows[:, 1:]  # the first is the background
        found.append((corners, classes.max(axis=1), classes.argmax(axis=1)))
    return found


def _ssd_names(outputs: Mapping[str, Array]) -> tuple[str, str] | None:
    """Return the names of the outputs of boxes and scores, or None if there are no such two. With three classes and a
    background, both have four columns, and the names decide."""
    if len(outputs) != 2 or any(array.ndim != 3 for array in outputs.values()):
        return None
    (one, first), (other, second) = outputs.items()
    if first.shape[:2] != second.shape[:2] or _BOX not in (first.shape[2], second.shape[2]):
        return None
    if first.shape[2] == second.shape[2]:
        return (other, one) if any(word in one.lower() for word in ("score", "conf", "class", "prob")) else (one, other)
    return (one, other) if first.shape[2] == _BOX else (other, one)


def _final(outputs: Mapping[str, Array]) -> _Raw:
    boxes = next(np.asarray(array, np.float32) for array in outputs.values() if array.ndim == 3)
    flat = {name: np.asarray(array, np.float32) for name, array in outputs.items() if array.ndim == 2}
    named = [name for name in flat if "class" in name.lower() or "label" in name.lower()]
    # Without a name that helps: scores lie between 0 and 1 and are no whole numbers.
    classes = named[0] if named else next(iter(sorted(flat, key=lambda name: -float(flat[name].max(initial=0)))))
    scores = next(name for name in flat if name != classes)
    turned = boxes[..., [1, 0, 3, 2]]
    return [
        (corners, score, kind.astype(np.int64))
        for corners, score, kind in zip(turned, flat[scores], flat[classes], strict=True)
    ]


def _rows(outputs: Mapping[str, Array]) -> _Raw:
    (array,) = outputs.values()
    rows = np.asarray(array, dtype=np.float32)
    return [(one[:, :_BOX], one[:, _BOX], np.rint(np.nan_to_num(one[:, _BOX + 1])).astype(np.int64)) for one in rows]


_READERS = {
    Head.ANCHOR_FREE: _anchor_free,
    Head.OBJECTNESS: _objectness,
    Head.SSD: _ssd,
    Head.FINAL: _final,
    Head.ROWS: _rows,
}


def _unit(raw: _Raw) -> bool:
    largest = max((float(np.nanmax(np.abs(corners), initial=0.0)) for corners, _, _ in raw), default=0.0)
    return largest <= _NORMALIZED
