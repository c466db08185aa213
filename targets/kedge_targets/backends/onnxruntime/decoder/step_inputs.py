"""The small inputs of a step: while steps have the same shape they are bound once, and written in place."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class StepInputs:
    """The inputs of a graph as described in ``decoder/graph.py`` that change from step to step.

    Args:
        binding: of some slots, see :meth:`kedge_targets.backends.onnxruntime.decoder.slot_caches.SlotCaches.inputs`.
        names: of all inputs that the graph has.
    """

    def __init__(self, binding: Any, names: Collection[str]) -> None:
        self.binding = binding
        self._names = names
        self._values = "hidden" if "hidden" in names else "input_ids"
        self._arrays: dict[str, Array] = {}

    def write(self, values: Array, lengths: Array, keep: int) -> None:
        """Set the inputs of a step.

        Args:
            values: tokens int64 [rows, step], or hidden states [rows, step, channels] for layers after others.
            lengths: positions of each row before the step, int64 [rows].
        """
        if not self._arrays or self._arrays[self._values].shape != values.shape:
            self._bind(values)
        arrays, step = self._arrays, values.shape[1]
        arrays[self._values][...] = values
        arrays["seqlens_k"][...] = lengths + (step - 1)
        arrays["total"][0] = max(lengths.tolist()) + step
        if "keep" in arrays:
            arrays["keep"][0] = keep
        if "position_ids" in arrays:
            arrays["position_ids"][...] = lengths[:, None] + np.arange(step)

    def _bind(self, values: Array) -> None:
        every = {
            self._values: np.empty(values.shape, values.dtype),
            "keep": np.empty(1, np.int64),
            "seqlens_k": np.empty(len(values), np.int32),
            "total": np.empty(1, np.int32),
            "position_ids": np.empty(values.shape[:2], np.int64),
        }
        self._arrays = {name: array for name, array in every.items() if name in self._names}
        for name, array in self._arrays.items():
            self.binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
