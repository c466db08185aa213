"""The first calibration samples of a step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy.typing as npt

from kedge.step import Context

Array = npt.NDArray[Any]

_AT_ONCE = 8


class LimitedSamples:
    """The first samples, to be read several times.

    Args:
        limit: largest number of samples.
    """

    def __init__(self, context: Context, limit: int) -> None:
        self._context = context
        self._limit = limit

    def __iter__(self) -> Iterator[dict[str, Array]]:
        done = 0
        size = 1 if self._context.fixed_batch else min(_AT_ONCE, self._limit)
        for feed in self._context.samples.batches(size):
            if done >= self._limit:
                return
            done += len(next(iter(feed.values())))
            yield feed
