"""Segmentation: a class for each pixel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge.evaluation import decisions
from kedge.evaluation.kinds import ClassifiedOutput
from kedge.evaluation.metrics.contract import Metric
from kedge_protocol.errors import DatasetError

Array = npt.NDArray[Any]

IGNORED = 255
"""A pixel with this label does not count (as in Pascal VOC and Cityscapes)."""
_RANK = 4


class MeanIou(Metric):
    """Mean over the classes of intersection over union of pixels, of answers and labels. Scores are NxCxHxW or NxHxWxC;
    an output of one channel says yes above 0.5 (or above 0, where it is no probability)."""

    name = "miou"
    needs_labels = True

    @classmethod
    def suits(cls, seen: ClassifiedOutput, reference: Array, labels: Any | None) -> bool:
        """Scores for each pixel of masks."""
        return isinstance(labels, np.ndarray) and _class_axis(reference, labels) is not None

    def check(self, reference: Mapping[str, Array], labels: Any | None, *, where: str) -> None:
        """Masks of whole numbers in the output's height and width, none beyond its classes."""
        array, masks = reference[self.output or ""], np.asarray(labels)
        axis = _class_axis(array, masks)
        if axis is None or masks.dtype.kind not in "iu":
            have, want = ("x".join(map(str, shape)) for shape in (masks.shape, array.shape))
            raise DatasetError(
                f"label has dtype {masks.dtype} and shape {have}; scores of {want} need masks of whole numbers",
                where=where,
            )
        used, classes = masks[masks != IGNORED], max(2, array.shape[axis])
        if used.size and (int(used.min()) < 0 or int(used.max()) >= classes):
            raise DatasetError(f"label holds {int(used.max())}, the classes are 0 to {classes - 1}", where=where)

    def per_sample(self, outputs: Mapping[str, Array], reference: Mapping[str, Array], labels: Any | None) -> Array:
        """N x classes x 2: pixels in both, and in either."""
        name, masks = self.output or "", np.asarray(labels)
        axis = _class_axis(reference[name], masks) or 1
        scores = np.asarray(outputs[name])
        classes = max(2, scores.shape[axis])
        if scores.shape[axis] == 1:
            answers = (np.squeeze(scores, axis=axis) > decisions.edge_of(reference[name])).astype(np.int64)
        else:
            answers = scores.argmax(axis=axis)
        used = masks != IGNORED
        found = np.empty((len(masks), classes, 2))
        for one in range(classes):
            wanted, got = (masks == one) & used, (answers == one) & used
            found[:, one, 0] = (wanted & got).sum(axis=(1, 2))
            found[:, one, 1] = (wanted | got).sum(axis=(1, 2))
        return found

    def aggregate(self, rows: Array) -> float:
        """The mean over the classes that occur."""
        both, either = rows.sum(axis=0).T
        there = either > 0
        return float(np.mean(both[there] / either[there])) if there.any() else 1.0


def _class_axis(output: Array, masks: Array) -> int | None:
    if output.ndim != _RANK or masks.ndim != _RANK - 1:
        return None
    for axis in (1, 3):
        if (*output.shape[:axis], *output.shape[axis + 1 :]) == masks.shape:
            return axis
    return None


METRICS = (MeanIou,)
