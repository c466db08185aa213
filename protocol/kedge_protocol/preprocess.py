"""Preprocessing: the same code on the host (calibration, evaluation) and on the device (every call)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kedge_protocol.bundle.config import Preprocess
from kedge_protocol.errors import InputError


def channel_axis(layout: str | None, rank: int) -> int:
    """The axis that per-channel values run along: ``C`` of the layout, else the last."""
    if layout is not None and "C" in layout and len(layout) == rank:
        return layout.index("C")
    return rank - 1


def apply(raw: npt.NDArray[np.generic], how: Preprocess, *, layout: str | None) -> npt.NDArray[np.float32]:
    """``(raw * scale - mean) / std`` in float32.

    Args:
        raw: samples of any numeric dtype, first axis the batch.
        how: one number, or one for each channel, for each step.
        layout: tells the channel axis.

    Raises:
        InputError: as many values as the input has no channels.
    """
    axis = channel_axis(layout, raw.ndim)

    def shaped(values: tuple[float, ...], name: str) -> npt.NDArray[np.float32]:
        array = np.asarray(values, dtype=np.float32)
        if array.size == 1:
            return array.reshape(())
        if array.size != raw.shape[axis]:
            raise InputError(
                f"{name} has {array.size} values for {raw.shape[axis]} channels (axis {axis})",
                where="preprocess",
                remedy="Give one value, or one for each channel",
            )
        return array.reshape([-1 if i == axis else 1 for i in range(raw.ndim)])

    out = raw.astype(np.float32)
    if how.scale != (1.0,):
        out *= shaped(how.scale, "scale")
    if how.mean != (0.0,):
        out -= shaped(how.mean, "mean")
    if how.std != (1.0,):
        out /= shaped(how.std, "std")
    return out
