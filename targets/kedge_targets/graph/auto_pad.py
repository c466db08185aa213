"""Computes ONNX's ``auto_pad``."""

from __future__ import annotations

import math
from collections.abc import Sequence


def explicit_pads(
    how: str, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Padding before and behind each axis of space (ONNX operators, Conv): none for ``VALID``; for ``SAME_UPPER`` and
    ``SAME_LOWER`` as much as makes the output ceil(size / stride) long, an odd one behind or before."""
    if how == "VALID":
        return [0] * len(kernel), [0] * len(kernel)
    before, behind = [], []
    for size, width, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max(0, (math.ceil(size / stride) - 1) * stride + (width - 1) * dilation + 1 - size)
        small, large = total // 2, total - total // 2
        before.append(small if how == "SAME_UPPER" else large)
        behind.append(large if how == "SAME_UPPER" else small)
    return before, behind
