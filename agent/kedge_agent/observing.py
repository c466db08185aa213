"""Looks at a bounded share of a model's calls, after they were answered: what the drift sketches count.

At most :data:`MOST_A_SECOND` calls a second of a process are looked at, and no more than :data:`SHARE` of its time is
spent on it, however long one look takes. All others pay for one comparison.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from time import perf_counter_ns, thread_time_ns
from typing import TYPE_CHECKING

from kedge_agent.sketches import Sketch
from kedge_protocol import tensors
from kedge_protocol.bundle.config import BundleConfig
from kedge_protocol.drift import Kind, Stream
from kedge_targets import drift

if TYPE_CHECKING:
    from pathlib import Path

    from kedge_agent.loaded import Array

log = logging.getLogger("kedge.observing")

MOST_A_SECOND = 20
SHARE = 0.005
"""Share of a thread's time."""
SAMPLES = 8
"""Samples of one batch that are looked at."""
NEVER = sys.maxsize

_warned: set[Path] = set()


class Observer:
    """Looks at the calls of one loaded bundle.

    Args:
        config: the bundle's configuration.
        sketch: where drift is counted.
        streams: the drift baseline.
    """

    def __init__(self, config: BundleConfig, sketch: Sketch, streams: Sequence[Stream]) -> None:
        self.due = [0]
        """Time (``perf_counter_ns``) after which the next call is looked at."""
        self._inputs = {spec.name: spec for spec in config.inputs}
        self._outputs = {spec.name: spec for spec in config.outputs}
        self._sketch = sketch
        self._streams = list(enumerate(streams))

    def look(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Look at one call. It never raises: the call was answered.

        Args:
            inputs, outputs: by name, as the caller gave and got them, with or without a batch axis.
        """
        # The thread's own time: what it waits for on a busy device is no work of ours.
        began = thread_time_ns()
        try:
            self._count(inputs, outputs)
        except Exception:
            log.debug("a call could not be looked at", exc_info=True)
        finally:
            pause = max(10**9 // MOST_A_SECOND, int((thread_time_ns() - began) / SHARE))
            self.due[0] = perf_counter_ns() + pause

    def close(self) -> None:
        """Close the files."""
        self._sketch.close()

    def _count(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        for number, stream in self._streams:
            spec = (self._inputs if stream.kind is Kind.INPUT else self._outputs)[stream.tensor]
            array = (inputs if stream.kind is Kind.INPUT else outputs)[stream.tensor]
            rows = array[None] if array.ndim < len(spec.shape) else tensors.to_batch_first(array, spec)
            for value in drift.values(stream.statistic, rows[:SAMPLES]).tolist():
                self._sketch.add(number, value)


def observer_of(folder: Path, *, digest: str, config: BundleConfig) -> Observer | None:
    """Return the observer of a bundle; None if there is nothing to look for, or this process may not count, which is
    logged once.

    Args:
        folder: ``models/NAME/sketches``.
    """
    if not config.drift:
        return None
    try:
        return Observer(config, Sketch(folder, digest=digest, streams=config.drift), config.drift)
    except OSError as error:
        if folder not in _warned:
            _warned.add(folder)
            log.warning("drift is not counted: %s: %s", folder, error.strerror or error)
        return None
