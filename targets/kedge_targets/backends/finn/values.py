"""What is known about an activation before any sample arrives, and the memory for a batch of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Step = Callable[[], object]

EXACT32 = 1 << 24
"""Largest exact integer in float32: it holds each integer up to here, and adds such integers without error as long as
no sum exceeds it."""
EXACT64 = 1 << 53
"""The same for float64."""


@dataclass(frozen=True, kw_only=True)
class Value:
    """An activation.

    Attributes:
        shape: shape of one sample, without the batch.
        integer: whether every value is an integer, in ``low`` .. ``high``.
        dtype: dtype that represents it: float32 or float64; int64 for indices.
        offset: integers that must still be added along the last axis; None if there are none.
    """

    shape: tuple[int, ...]
    integer: bool
    low: float = -np.inf
    high: float = np.inf
    dtype: np.dtype[Any] = np.dtype(np.float32)  # noqa: RUF009 -- a dtype is never changed
    offset: Array | None = None

    @property
    def size(self) -> int:
        """Return the size of one sample in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class _Block:
    """A block of memory, and the names of the activations in it."""

    def __init__(self, raw: npt.NDArray[np.uint8]) -> None:
        self.raw = raw
        self.names: set[str] = set()


class Space:
    """The memory of one batch: arrays by name, taken from a pool and returned after their last use, and the steps that
    fill them.

    Args:
        batch: number of samples.
        values: what is known about every activation.
        last_use: activation → number of the last operation that reads it; the graph's outputs are never returned.
    """

    def __init__(self, batch: int, values: Mapping[str, Value], last_use: Mapping[str, int]) -> None:
        self.batch = batch
        self.steps: list[Step] = []
        self._values = values
        self._last_use = last_use
        self._arrays: dict[str, Array] = {}
        self._blocks: dict[str, _Block] = {}
        self._free: list[npt.NDArray[np.uint8]] = []
        self._scratch: list[npt.NDArray[np.uint8]] = []
        self._number = -1

    def __getitem__(self, name: str) -> Array:
        return self._arrays[name]

    def begin(self, number: int) -> None:
        """Start the next operation; memory last read by the previous one is free again."""
        self._number = number
        self._free += self._scratch
        self._scratch = []
        for name in [name for name in self._blocks if self._last_use[name] < number]:
            block = self._blocks.pop(name)
            block.names.discard(name)
            del self._arrays[name]
            if not block.names:
                self._free.append(block.raw)

    def new(self, name: str, *, over: str | None = None) -> Array:
        """Return memory for an activation.

        Args:
            name: name of the activation.
            over: an input that is read element by element in the output's order, so that it may be overwritten if
                nothing else needs it.
        """
        value = self._values[name]
        shape = (self.batch, *value.shape)
        if over is not None and self._may_overwrite(over, shape, value.dtype):
            return self.alias(name, over, self._arrays[over])
        block = _Block(self._take(value.size * self.batch))
        block.names.add(name)
        self._blocks[name] = block
        self._arrays[name] = self._shaped(block.raw, shape, value.dtype)
        return self._arrays[name]

    def alias(self, name: str, of: str, array: Array) -> Array:
        """Register an activation in the memory of another; ``array`` is the view."""
        block = self._blocks[of]
        block.names.add(name)
        self._blocks[name] = block
        self._arrays[name] = array
        return array

    def scratch(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return memory for this operation alone."""
        wanted = np.dtype(dtype)
        raw = self._take(int(np.prod(shape, dtype=np.int64)) * wanted.itemsize)
        self._scratch.append(raw)
        return self._shaped(raw, shape, wanted)

    def step(self, function: Callable[..., object], *arguments: Any, **more: Any) -> None:
        """Add a call that is made each time the batch is run."""
        self.steps.append(functools.partial(function, *arguments, **more))

    def as_type(self, array: Array, dtype: Any) -> Array:
        """Return the array in another dtype: itself, or a copy that a step makes."""
        if array.dtype == dtype:
            return array
        copied = self.scratch(array.shape, dtype)
        self.step(np.copyto, copied, array, casting="unsafe")
        return copied

    def reshaped(self, array: Array, shape: tuple[int, ...]) -> Array:
        """Return the array in another shape: a view, or a copy that a step makes if its memory does not allow a
        view."""
        turned = array.view()
        try:
            turned.shape = shape
        except AttributeError:
            copied = self.scratch(array.shape, array.dtype)
            self.step(np.copyto, copied, array)
            return copied.reshape(shape)
        return turned

    def _may_overwrite(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> bool:
        array, block = self._arrays[name], self._blocks[name]
        return (
            array.shape == shape
            and array.dtype == dtype
            and array.flags.c_contiguous
            and all(self._last_use[other] <= self._number for other in block.names)
        )

    def _take(self, size: int) -> npt.NDArray[np.uint8]:
        fitting = [index for index, raw in enumerate(self._free) if raw.size >= size]
        if fitting:
            return self._free.pop(min(fitting, key=lambda index: self._free[index].size))
        return np.zeros(max(size, 1), dtype=np.uint8)

    @staticmethod
    def _shaped(raw: npt.NDArray[np.uint8], shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        count = int(np.prod(shape, dtype=np.int64))
        return raw[: count * dtype.itemsize].view(dtype).reshape(shape)
