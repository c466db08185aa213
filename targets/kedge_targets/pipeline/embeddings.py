"""Makes an embedding: one vector from a model's output."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.bundle.pipeline import Embedding, Pooling
from kedge_targets.pipeline.answers import Vector

Array = npt.NDArray[Any]

_LEAST = 1e-12


def vector(output: Array, how: Embedding, mask: Array | None = None) -> Vector:
    """Return the vector of one sample.

    Args:
        output: the sample's output: ``[T, D]`` with a pooling, otherwise any shape, which is flattened.
        mask: ``[T]``, 1 for tokens that are not padding; None if all count.
    """
    values = output.astype(np.float64)
    if how.pooling is Pooling.MEAN and values.ndim == 2:
        weights = np.ones(len(values)) if mask is None else mask[: len(values)].astype(np.float64)
        values = (values * weights[:, None]).sum(axis=0) / max(float(weights.sum()), 1.0)
    elif how.pooling is Pooling.FIRST and values.ndim == 2:
        values = values[0]
    flat = values.reshape(-1)
    if how.normalize:
        flat = flat / max(float(np.linalg.norm(flat)), _LEAST)
    return Vector(flat.astype(np.float32))
