"""The keys and values of all slots in a GPU's memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from kedge_protocol.errors import InputError
from kedge_targets.backends.onnxruntime.decoder.slot_caches import SlotCaches, zeros
from kedge_targets.graph import library


@dataclass(frozen=True)
class _Cache:
    """A tensor of ONNX Runtime in a device's memory."""

    value: Any
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class DeviceCaches(SlotCaches):
    """See :class:`SlotCaches`.

    A beginning is copied between slots by way of the processor's memory: ONNX Runtime's Python interface has no copy
    from a part of a tensor to another.

    Attributes:
        device: ONNX Runtime's name of the kind of device.
    """

    device = "cuda"

    def _made(self, shape: tuple[int, ...], dtype: Any) -> _Cache:
        empty = zeros(shape, dtype)
        try:
            value = library.load().OrtValue.ortvalue_from_numpy(empty, self.device, 0)
        except Exception as error:  # the library's errors have no common base but Exception
            raise InputError(
                f"a cache of {' x '.join(map(str, shape))} does not fit into the GPU's memory:"
                f" {library.reason_of(error)}",
                remedy="Ask for fewer slots or a shorter context",
            ) from error
        return _Cache(value, shape, empty.dtype)

    def _place(self, cache: _Cache, first: int, rows: int) -> tuple[Any, ...]:
        row_bytes = cache.nbytes // cache.shape[0]
        address = cache.value.data_ptr() + first * row_bytes
        return self.device, 0, cache.dtype.type, (rows, *cache.shape[1:]), address

    def copy(self, source: int, to: int, positions: int) -> None:
        """See :meth:`SlotCaches.copy`."""
        for cache in self._caches.values():
            content = cache.value.numpy()
            content[to, :, :positions] = content[source, :, :positions]
            cache.value.update_inplace(content)
