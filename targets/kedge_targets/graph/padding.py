"""Padding of sequences: at the positions that an input's attention mask marks, nothing reads what the graph computes,
so that no statistic of a layer should count it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def is_mask(name: str) -> bool:
    """Return whether an input of this name tells real tokens (not 0) from padding; a padding mask may say the
    opposite."""
    return "mask" in name.lower() and "pad" not in name.lower()


def real_rows(feed: Mapping[str, Array], shape: tuple[int, ...]) -> Array | None:
    """Return which rows of an activation are those of real tokens.

    Args:
        feed: the graph's inputs, with a mask of whole numbers or bools N x length among them.
        shape: of the activation, N x length x width, or (N * length) x width.

    Returns:
        bool, N * length; None without a mask that fits, or if it marks everything as padding.
    """
    for name, value in feed.items():
        mask = np.asarray(value)
        if not is_mask(name) or mask.dtype.kind not in "iub" or mask.ndim != 2:
            continue
        if shape[:-1] in (mask.shape, (mask.size,)) and mask.any():
            found: Array = mask.reshape(-1) != 0
            return found
    return None
