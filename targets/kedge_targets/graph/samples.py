"""Calibration as the quantizer of ONNX Runtime reads it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kedge_targets.contract import Array, Calibration
from kedge_targets.graph import batch, signature

if TYPE_CHECKING:
    import onnx

CHUNK_BYTES = 64 << 20
"""How much of the activations the percentile calibration may hold at once."""


class Samples:
    """The calibration as ONNX Runtime reads it: one batch after the other, none kept.

    Its percentile calibration keeps the activations of all that it reads until ``get_next`` answers None, and begins
    anew for each range that ``set_range`` names; so the samples are given in chunks that fit into memory.
    """

    def __init__(self, calibration: Calibration, at_once: int | None) -> None:
        self.used = 0
        self._total = -(-calibration.samples // (at_once or 1))
        self._batches = batch.grouped(self._counted(calibration), at_once)
        self._chunk = self._left = max(1, self._total)

    def _counted(self, calibration: Calibration) -> Iterator[dict[str, Array]]:
        for sample in calibration:
            self.used += 1
            yield sample

    def split(self, model: onnx.ModelProto) -> None:
        """Give so many batches at once that the graph's activations stay within :data:`CHUNK_BYTES`; one where their
        length may differ, since what is held at once is put into one array."""
        free = any(None in info.shape[1:] for info in signature.inputs(model))
        self._chunk = self._left = 1 if free else max(1, CHUNK_BYTES // (4 * _values_a_batch(model)))

    def __len__(self) -> int:
        return -(-self._total // self._chunk)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._left = self._chunk

    def get_next(self) -> dict[str, Array] | None:
        if self._left <= 0:
            return None
        self._left -= 1
        return next(self._batches, None)


def _values_a_batch(model: onnx.ModelProto) -> int:
    """How many numbers the graph's tensors hold for one batch of one sample, where shapes are known."""
    total = 0
    for value in model.graph.value_info:
        size = 1
        for dim in value.type.tensor_type.shape.dim:
            size *= max(dim.dim_value, 1)
        total += size
    return max(total, 1)
