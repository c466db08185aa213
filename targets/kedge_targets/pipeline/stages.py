"""Overlaps stages: while the model computes, the next item is decoded and the last answer is finished."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from kedge_targets.pipeline.execution import Other, Raw, Runner

AHEAD = 2
"""The number of items prepared before the model is ready for them."""


def overlapped(items: Iterable[Any], runner: Runner, raw: Raw, *, other: Other | None = None) -> Iterator[Any]:
    """Yield answers in the order of the items; an item's error is raised in its turn and ends the iteration.

    At most :data:`AHEAD` items are prepared in advance, and as many answers wait, so memory stays bounded for a source
    of any length. A pipeline that continues with another model runs it while the first takes the next item.
    """
    source = iter(items)
    with ThreadPoolExecutor(1, "kedge-prepare") as before, ThreadPoolExecutor(1, "kedge-finish") as after:
        coming: deque[Future[Any]] = deque()
        finishing: deque[Future[Any]] = deque()

        def fill() -> None:
            while len(coming) < AHEAD:
                try:
                    item = next(source)
                except StopIteration:
                    return
                coming.append(before.submit(runner.prepare, item))

        fill()
        while coming:
            feeds, context = coming.popleft().result()
            fill()
            outputs = raw(feeds)
            finishing.append(after.submit(runner.finish, outputs, context, other=other))
            if len(finishing) > AHEAD:
                yield finishing.popleft().result()
        while finishing:
            yield finishing.popleft().result()
