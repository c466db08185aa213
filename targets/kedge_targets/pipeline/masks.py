"""Segmentation: gets a class for each pixel of the picture from a model's scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.bundle.pipeline import Mask
from kedge_targets.pipeline.answers import Segments
from kedge_targets.pipeline.pictures import Placement
from kedge_targets.pipeline.scores import activated

Array = npt.NDArray[Any]


def segments(output: Array, how: Mask, labels: Sequence[str], placement: Placement) -> Segments:
    """Return the classes in the picture's own pixels (nearest neighbour).

    Args:
        output: one sample's output: scores C x H x W or H x W x C (the channel axis is the shortest), or classes H x W.
    """
    classes = _classes(output, how)
    height, width = classes.shape
    wide, high = placement.input_size
    columns = _source(placement.size[0], placement.scale[0], placement.offset[0], width / wide, width)
    rows = _source(placement.size[1], placement.scale[1], placement.offset[1], height / high, height)
    kind = np.uint8 if classes.max(initial=0) < 256 else np.int32
    return Segments(np.ascontiguousarray(classes[rows][:, columns].astype(kind)), tuple(labels))


def _classes(output: Array, how: Mask) -> Array:
    if output.ndim == 2:
        return output if output.dtype.kind in "iu" else (activated(output, how.activation) >= how.threshold).astype(int)
    axis = int(np.argmin(output.shape))
    if output.shape[axis] == 1:
        return _classes(np.squeeze(output, axis).astype(np.float64), how)
    return np.asarray(output.argmax(axis=axis))


def _source(count: int, scale: float, offset: float, ratio: float, limit: int) -> Array:
    """Return, for each pixel of the picture, the output pixel that contains its centre."""
    middle = ((np.arange(count) + 0.5) * scale + offset) * ratio
    return np.clip(middle.astype(np.int64), 0, limit - 1)
