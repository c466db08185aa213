"""Adapts calibration samples to ONNX Runtime's quantizer."""

from __future__ import annotations

from collections.abc import Iterator

from kedge_targets.contract import Array, Calibration
from kedge_targets.graph import batch


class Samples:
    """Reads one batch after another without keeping any; ``used`` counts the samples."""

    def __init__(self, calibration: Calibration, at_once: int | None) -> None:
        self.used = 0
        self._batches = batch.regroup(self._counted(calibration), at_once)

    def _counted(self, calibration: Calibration) -> Iterator[dict[str, Array]]:
        for sample in calibration:
            self.used += 1
            yield sample

    def batches(self) -> Iterator[dict[str, Array]]:
        """Return all remaining batches."""
        return self._batches

    def get_next(self) -> dict[str, Array] | None:
        """Return the next batch, or None at the end, as ``CalibrationDataReader`` requires."""
        return next(self._batches, None)
