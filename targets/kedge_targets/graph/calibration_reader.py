"""Calibration as the quantizer of ONNX Runtime reads it."""

from __future__ import annotations

from collections.abc import Iterator

from kedge_targets.contract import Array, Calibration
from kedge_targets.graph import batch


class Samples:
    """One batch after the other, none kept; ``used`` counts the samples."""

    def __init__(self, calibration: Calibration, at_once: int | None) -> None:
        self.used = 0
        self._batches = batch.regroup(self._counted(calibration), at_once)

    def _counted(self, calibration: Calibration) -> Iterator[dict[str, Array]]:
        for sample in calibration:
            self.used += 1
            yield sample

    def batches(self) -> Iterator[dict[str, Array]]:
        """All that are left."""
        return self._batches

    def get_next(self) -> dict[str, Array] | None:
        """What ``CalibrationDataReader`` asks for: the next batch, None at the end."""
        return next(self._batches, None)
