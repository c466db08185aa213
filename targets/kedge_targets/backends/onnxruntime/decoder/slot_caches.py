"""The keys and values of all slots: past and present of a cache are one buffer, bound by its address."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.errors import InputError

Array = npt.NDArray[Any]

TYPES: dict[str, Any] = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}


class SlotCaches:
    """The caches of a session's ``past`` inputs.

    Args:
        session: an ONNX Runtime session of a graph as described in ``decoder/graph.py``.
        fixed: further inputs by name, float32 [slots, …], that the session only reads.

    Raises:
        InputError: the caches do not fit into memory.
    """

    def __init__(self, session: Any, *, slots: int, context: int, fixed: Mapping[str, Array]) -> None:
        self._session = session
        self._caches = {
            one.name: self._made((slots, one.shape[1], _room(one, context), one.shape[3]), TYPES[one.type])
            for one in session.get_inputs()
            if one.name.startswith("past.")
        }
        self._fixed = fixed
        self._bindings: dict[tuple[int, int], Any] = {}

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

    def bound(self, first: int, rows: int) -> Any:
        """Return a binding of the slots from ``first`` on; its caches stay bound."""
        if (first, rows) not in self._bindings:
            binding = self._session.io_binding()
            for name, cache in self._caches.items():
                place = self._place(cache, first, rows)
                binding.bind_input(name, *place)
                binding.bind_output(name.replace("past.", "present."), *place)
            for name, fixed in self._fixed.items():
                part = fixed[first : first + rows]
                binding.bind_input(name, "cpu", 0, np.float32, part.shape, part.ctypes.data)
            self._bindings[first, rows] = binding
        return self._bindings[first, rows]

    def close(self) -> None:
        """Release the caches."""
        self._bindings.clear()
        self._caches.clear()
        self._session = None


def _room(cache: Any, context: int) -> int:
    return cache.shape[2] if isinstance(cache.shape[2], int) else context


def after(lengths: Array, step: int) -> dict[str, Array]:
    """Return the inputs that say how many positions the rows have after a step."""
    then = lengths + step
    return {"seqlens_k": (then - 1).astype(np.int32), "total": np.array([then.max()], np.int32)}


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
