"""The calibration samples as NNCF reads them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from kedge_targets.contract import Array, Calibration
from kedge_targets.graph import batch, signature
from kedge_targets.graph.changed_calibration import ChangedCalibration

if TYPE_CHECKING:
    import onnx

_TOGETHER = 32
_BYTES = 64 << 20
"""Of all activations of one call: NNCF makes outputs of most of them."""


def at_once(given: onnx.ModelProto, options: Mapping[str, Any]) -> int | None:
    """Return how many samples go into one call: the graph's own batch; where that is free, as many as keep their
    activations small, since extremes of a batch are those of its samples. None for single samples."""
    fixed: int | None = batch.size(given)
    if fixed is not None or options.get("bias_correction", False):
        return fixed
    sizes: list[int] = []
    for value in (*given.graph.input, *given.graph.value_info, *given.graph.output):
        axes = value.type.tensor_type.shape.dim[1:]
        if any(axis.dim_value < 1 for axis in axes):
            return None
        sizes.append(math.prod(axis.dim_value for axis in axes))
    if any(any(axis is None for axis in info.shape[1:]) for info in signature.inputs(given)):
        return None
    return max(1, min(_TOGETHER, _BYTES // (4 * max(1, sum(sizes)))))


class SingleCalibration(ChangedCalibration):
    """Calibration samples in float32 for those in float64, which the CPU plugin does not take."""

    def changed(self, name: str, array: Array) -> Array:
        """See :meth:`ChangedCalibration.changed`."""
        return array.astype(np.float32) if array.dtype == np.float64 else array


class Samples:
    """Batches, one after another, as often as NNCF wants them, without keeping any.

    Args:
        together: samples of one batch; None for one.
    """

    def __init__(self, calibration: Calibration, together: int | None) -> None:
        self.used = 0
        self._calibration = calibration
        self._together = together
        self.batches = -(-calibration.samples // (together or 1))

    def __iter__(self) -> Iterator[dict[str, Array]]:
        return batch.regroup(self._counted(), self._together)

    def _counted(self) -> Iterator[dict[str, Array]]:
        for count, sample in enumerate(self._calibration, start=1):
            self.used = max(self.used, count)
            yield sample
