"""Normalizes inputs, with the same code on the host (calibration, evaluation) and on the device (every call)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kedge_protocol.bundle.config import Preprocess
from kedge_protocol.errors import InputError

Prepared = Callable[[npt.NDArray[np.generic]], npt.NDArray[np.float32]]


def channel_axis(layout: str | None, rank: int) -> int:
    """Return the axis of per-channel values: ``C`` of the layout, or the last axis."""
    if layout is not None and "C" in layout and len(layout) == rank:
        return layout.index("C")
    return rank - 1


def prepared(how: Preprocess, *, layout: str | None, rank: int) -> Prepared:
    """Return :func:`apply` for many arrays of one rank; everything that does not depend on the samples is computed
    once.

    The result is always a new array.
    """
    axis = channel_axis(layout, rank)
    steps = []
    for name, function, values, neutral in (
        ("scale", np.multiply, how.scale, 1.0),
        ("mean", np.subtract, how.mean, 0.0),
        ("std", np.divide, how.std, 1.0),
    ):
        if values != (neutral,):
            array = np.asarray(values, dtype=np.float32)
            shape = () if array.size == 1 else tuple(-1 if i == axis else 1 for i in range(rank))
            steps.append((name, function, array.reshape(shape), array.size))

    def turn(raw: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
        out = raw.astype(np.float32)
        for name, function, operand, size in steps:
            if size != 1 and size != raw.shape[axis]:
                raise InputError(
                    f"{name} has {size} values for {raw.shape[axis]} channels (axis {axis})",
                    where="preprocess",
                    remedy="Give one value, or one for each channel",
                )
            function(out, operand, out=out)
        return out

    return turn


def apply(raw: npt.NDArray[np.generic], how: Preprocess, *, layout: str | None) -> npt.NDArray[np.float32]:
    """Return ``(raw * scale - mean) / std`` in float32.

    Args:
        raw: samples of any numeric dtype, batch axis first.
        how: for each step, one number or one per channel.
        layout: defines the channel axis.

    Raises:
        InputError: the number of values differs from the number of channels.
    """
    return prepared(how, layout=layout, rank=raw.ndim)(raw)
