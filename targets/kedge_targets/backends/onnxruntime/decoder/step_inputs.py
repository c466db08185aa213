"""The small inputs of a step: while steps have the same shape they are bound once, and written in place."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class StepInputs:
    """The inputs of a graph as described in ``decoder/graph.py`` that change from step to step.

    Args:
        binding: of some slots, see :meth:`kedge_targets.backends.onnxruntime.decoder.slot_caches.SlotCaches.bound`.
        positions: whether the graph takes positions.
    """

    def __init__(self, binding: Any, *, positions: bool) -> None:
        self.binding = binding
        self._positions = positions
        self._arrays: dict[str, Array] = {}

    def write(self, tokens: Array, lengths: Array, keep: int) -> None:
        """Set the inputs of a step.

        Args:
            tokens: int64 [rows, step].
            lengths: positions of each row before the step, int64 [rows].
        """
        if not self._arrays or self._arrays["input_ids"].shape != tokens.shape:
            self._bind(tokens.shape)
        arrays, step = self._arrays, tokens.shape[1]
        arrays["input_ids"][...] = tokens
        arrays["keep"][0] = keep
        arrays["seqlens_k"][...] = lengths + (step - 1)
        arrays["total"][0] = max(lengths.tolist()) + step
        if self._positions:
            arrays["position_ids"][...] = lengths[:, None] + np.arange(step)

    def _bind(self, shape: tuple[int, ...]) -> None:
        self._arrays = {
            "input_ids": np.empty(shape, np.int64),
            "keep": np.empty(1, np.int64),
            "seqlens_k": np.empty(shape[0], np.int32),
            "total": np.empty(1, np.int32),
        }
        if self._positions:
            self._arrays["position_ids"] = np.empty(shape, np.int64)
        for name, array in self._arrays.items():
            self.binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
