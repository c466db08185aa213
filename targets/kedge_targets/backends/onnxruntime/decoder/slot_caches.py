"""The keys and values of all slots: past and present of a cache are one buffer, bound by its address."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.errors import InputError
from kedge_targets.backends.onnxruntime.decoder.step_inputs import StepInputs
from kedge_targets.backends.onnxruntime.decoder.windows import window_in
from kedge_targets.decoder.windows import Window

Array = npt.NDArray[Any]

TYPES: dict[str, Any] = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}


class SlotCaches:
    """The caches of a session's ``past`` inputs.

    Args:
        session: an ONNX Runtime session of a graph as described in ``decoder/graph.py``.
        fixed: further inputs by name, float32 [slots, …], that the session only reads.

    Attributes:
        windows: see :attr:`kedge_targets.decoder.session.DecoderSession.windows`.

    Raises:
        InputError: the caches do not fit into memory.
    """

    def __init__(self, session: Any, *, slots: int, context: int, fixed: Mapping[str, Array]) -> None:
        self._session = session
        self._caches: dict[str, Any] = {}
        windows = set()
        for one in session.get_inputs():
            if one.name.startswith("past."):
                _, heads, room, size = one.shape
                if isinstance(room, int):
                    windows.add(window_in(room))
                else:
                    room = context
                self._caches[one.name] = self._made((slots, heads, room, size), TYPES[one.type])
        self.windows: Collection[Window] = windows
        self._fixed = fixed
        self._inputs: dict[tuple[int, int], StepInputs] = {}

    def _made(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Return a cache; what it is, :meth:`_place` and :meth:`copy` know."""
        return zeros(shape, dtype)

    def _place(self, cache: Any, first: int, rows: int) -> tuple[Any, ...]:
        """Return where some rows of a cache are: device, its number, type, shape and address."""
        part = cache[first : first + rows]
        return "cpu", 0, part.dtype.type, part.shape, part.ctypes.data

    @property
    def nbytes(self) -> int:
        """Return the bytes of the caches."""
        return sum(cache.nbytes for cache in self._caches.values())

    def copy(self, source: int, to: int, positions: int) -> None:
        """Copy the first positions of one slot to another; a window that holds fewer is copied whole."""
        for cache in self._caches.values():
            cache[to, :, :positions] = cache[source, :, :positions]

    def inputs(self, first: int, rows: int) -> StepInputs:
        """Return the inputs of a step of the slots from ``first`` on; these caches stay bound in their binding."""
        if (first, rows) not in self._inputs:
            binding = self._session.io_binding()
            for name, cache in self._caches.items():
                place = self._place(cache, first, rows)
                binding.bind_input(name, *place)
                binding.bind_output(name.replace("past.", "present."), *place)
            for name, fixed in self._fixed.items():
                part = fixed[first : first + rows]
                binding.bind_input(name, "cpu", 0, np.float32, part.shape, part.ctypes.data)
            self._inputs[first, rows] = StepInputs(binding, {one.name for one in self._session.get_inputs()})
        return self._inputs[first, rows]

    def close(self) -> None:
        """Release the caches."""
        self._inputs.clear()
        self._caches.clear()
        self._session = None


def zeros(shape: tuple[int, ...], dtype: Any) -> Array:
    """Return an empty cache.

    Raises:
        InputError: it does not fit into memory.
    """
    try:
        return np.zeros(shape, dtype)
    except MemoryError as error:
        raise InputError(
            f"a cache of {' x '.join(map(str, shape))} does not fit into memory",
            remedy="Ask for fewer slots or a shorter context",
        ) from error
