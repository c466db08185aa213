"""Finds the layer that changed a sample: the one whose rounding alone, with all others in float, changes its outputs
most.

For the report only: the samples are evaluation samples, and nothing is decided by the result.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge.quantization.sensitivity import Limited, Run
from kedge.step import SampleSet

if TYPE_CHECKING:
    import onnx

    from kedge_targets.numerics import Precision, QuantizationScheme

Array = npt.NDArray[Any]

_CALIBRATION = 16
"""Number of samples from which the ranges of activations are taken."""
_FOR_RANGES = 0.4


def most_altering(
    model: onnx.ModelProto,
    calibration: SampleSet,
    picked: Sequence[dict[str, Array]],
    precision: Precision,
    *,
    quantized: QuantizationScheme | None = None,
    floating: Collection[str] = (),
    seconds: float = 8.0,
) -> list[str | None]:
    """Return the layer for each sample; None if no layer was measured in time, or none changes the sample.

    Args:
        model: the float graph with named nodes; not changed.
        calibration: samples for the ranges of activations.
        picked: the samples as the model takes them, one at a time, with their sample axis.
        precision: of the layers.
        quantized: the scheme of int8.
        floating: layers left in float.
        seconds: approximate wall-clock time.

    Raises:
        DatasetError, ModelError: see :func:`kedge.quantization.sensitivity.measure`.
    """
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="kedge-") as scratch:
        run = Run(model, (precision,), quantized, 32, True, 0, Path(scratch))
    limited = Limited(calibration, _CALIBRATION)
    run.begin(limited, None, None)
    run.observe(limited, seconds=_FOR_RANGES * (end - time.monotonic()))
    found: list[str | None] = []
    for number, feeds in enumerate(picked):
        # What is left of the time is shared by the samples that are left.
        share = (end - time.monotonic()) / (len(picked) - number)
        errors = run.errors(feeds, precision, end=time.monotonic() + max(0.0, share))
        ranked = [(float(np.max(error)), name) for name, error in errors if name not in floating]
        largest = max(ranked, default=(0.0, ""), key=lambda one: one[0])
        found.append(largest[1] if largest[0] > 0 else None)
    return found
