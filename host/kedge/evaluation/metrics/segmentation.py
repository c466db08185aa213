"""Segmentation: a class for each pixel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge.evaluation import decisions
from kedge.evaluation.kinds import ClassifiedOutput, whole_numbers
from kedge.evaluation.metrics.contract import Metric
from kedge_protocol.errors import DatasetError

Array = npt.NDArray[Any]

IGNORED = 255
"""A pixel with this label does not count (as in Pascal VOC and Cityscapes)."""
_PIXELS = 3
"""Axes of masks: sample, height and width."""


class MeanIou(Metric):
    """Mean over the classes of intersection over union of pixels, of answers and labels. Scores are NxCxHxW or NxHxWxC;
    an output of one channel, or NxHxW, says yes above 0.5 (or above 0, where it is no probability). Class numbers that
    the model gives itself are NxHxW."""

    name = "miou"
    needs_labels = True

    @classmethod
    def suits(cls, seen: ClassifiedOutput, reference: Array, labels: Any | None) -> bool:
        """Scores, or class numbers, for each pixel of masks."""
        masks = _masks(labels)
        return masks.dtype.kind in "iu" and _class_axis(reference, masks) is not None

    def check(self, reference: Mapping[str, Array], labels: Any | None, *, where: str) -> None:
        """Masks of whole numbers in the output's height and width, none beyond its classes, of two at least."""
        array, masks = reference[self.output or ""], _masks(labels)
        if _class_axis(array, masks) is None or masks.dtype.kind not in "iu":
            have, want = ("x".join(map(str, shape)) for shape in (masks.shape, array.shape))
            raise DatasetError(
                f"label has dtype {masks.dtype} and shape {have}; an output of {want} needs masks of whole numbers",
                where=where,
            )
        used, classes = masks[masks != IGNORED], self._classes(array, masks)
        low, high = int(used.min(initial=0)), int(used.max(initial=0))
        if low < 0 or high >= classes:
            raise DatasetError(
                f"label holds {low if low < 0 else high}, the classes are 0 to {classes - 1}",
                where=where,
                remedy=f"Pixels that do not count are {IGNORED}",
            )
        if used.size < masks.size and low == high:
            raise DatasetError(
                f"label holds {high} and {IGNORED} alone, and {IGNORED} does not count",
                where=where,
                remedy="Store class numbers: 1 for yes in masks of yes and no",
            )

    def per_sample(self, outputs: Mapping[str, Array], reference: Mapping[str, Array], labels: Any | None) -> Array:
        """N x classes x 2: pixels in both, and in either."""
        name, masks = self.output or "", _masks(labels)
        axis = _class_axis(reference[name], masks) or 0
        scores = np.asarray(outputs[name])
        classes = self._classes(reference[name], masks)
        if reference[name].dtype.kind != "f":
            answers = scores.reshape(masks.shape)
        elif not axis or scores.shape[axis] == 1:
            answers = (scores.reshape(masks.shape) > decisions.edge_of(reference[name])).astype(np.int64)
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

    @staticmethod
    def _classes(reference: Array, masks: Array) -> int:
        """How many classes there are: the channels of scores, else those that occur."""
        if reference.dtype.kind != "f":
            return 1 + int(max(reference.max(initial=1), masks[masks != IGNORED].max(initial=1)))
        return max(2, reference.shape[_class_axis(reference, masks) or 0] if reference.ndim > _PIXELS else 2)


def _masks(labels: Any) -> Array:
    """Return masks as NxHxW whole numbers, also where they are stored as real ones or flags, or with a channel."""
    masks = np.asarray(labels)
    if masks.ndim == _PIXELS + 1 and 1 in (masks.shape[1], masks.shape[3]):
        masks = np.squeeze(masks, axis=1 if masks.shape[1] == 1 else 3)
    return whole_numbers(masks)


def _class_axis(output: Array, masks: Array) -> int | None:
    """Return the axis of an output's channels, 0 where it has none; None where it is no output for such masks."""
    if masks.ndim != _PIXELS:
        return None
    if output.shape == masks.shape:
        return 0
    if output.ndim != _PIXELS + 1:
        return None
    for axis in (1, 3):
        if (*output.shape[:axis], *output.shape[axis + 1 :]) == masks.shape:
            return axis
    return None


METRICS = (MeanIou,)
