"""Looks at a bounded share of a model's calls, after they were answered: what the drift sketches count, and what a
shadow is shown.

At most :data:`MOST_A_SECOND` calls a second of a process are looked at, and no more than :data:`SHARE` of its time is
spent on it, however long one look takes. All others pay for one comparison.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from time import perf_counter_ns, thread_time_ns
from typing import TYPE_CHECKING

from kedge_agent.samples import single
from kedge_agent.shadow.tap import Tap
from kedge_agent.sketches import Sketch
from kedge_agent.slots import ModelFolder
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
        sketch: where drift is counted; None without a baseline.
        streams: the drift baseline.
        tap: the way to a shadow.
    """

    def __init__(
        self, config: BundleConfig, sketch: Sketch | None, streams: Sequence[Stream], tap: Tap | None = None
    ) -> None:
        self.due = [0]
        """Time (``perf_counter_ns``) after which the next call is looked at."""
        self._inputs = {spec.name: spec for spec in config.inputs}
        self._outputs = {spec.name: spec for spec in config.outputs}
        self._sketch = sketch
        self._streams = list(enumerate(streams))
        self._tap = tap

    def look(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], nanoseconds: int = 0) -> None:
        """Look at one call. It never raises: the call was answered.

        Args:
            inputs, outputs: by name, as the caller gave and got them, with or without a batch axis.
            nanoseconds: how long the call took.
        """
        # The thread's own time: what it waits for on a busy device is no work of ours.
        began = thread_time_ns()
        try:
            self._count(inputs, outputs)
            if self._tap is not None:
                self._tap.show(nanoseconds, inputs, outputs)
        except Exception:
            log.debug("a call could not be looked at", exc_info=True)
        finally:
            pause = max(10**9 // MOST_A_SECOND, int((thread_time_ns() - began) / SHARE))
            self.due[0] = perf_counter_ns() + pause

    def close(self) -> None:
        """Close the files, and end the thread."""
        if self._sketch is not None:
            self._sketch.close()
        if self._tap is not None:
            self._tap.close()

    def _count(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        if self._sketch is None:
            return
        batch = {name: single.rows(inputs[name], spec) for name, spec in self._inputs.items()}
        for digest in drift.digests(batch, SAMPLES):
            self._sketch.add_sample(digest)
        for number, stream in self._streams:
            spec = (self._inputs if stream.kind is Kind.INPUT else self._outputs)[stream.tensor]
            array = (inputs if stream.kind is Kind.INPUT else outputs)[stream.tensor]
            rows = single.rows(array, spec)
            for value in drift.values(stream.statistic, rows[:SAMPLES]).tolist():
                self._sketch.add(number, value)


def observer_of(folder: ModelFolder, *, digest: str, config: BundleConfig) -> Observer | None:
    """Return the observer of a bundle; None for a language model. Where this process may not count drift, that is
    logged once."""
    if config.generation is not None:
        return None
    sketch, streams = None, config.drift or ()
    try:
        sketch = Sketch(folder.sketches, digest=digest, streams=streams) if streams else None
    except OSError as error:
        if folder.path not in _warned:
            _warned.add(folder.path)
            log.warning("drift is not counted: %s: %s", folder.sketches, error.strerror or error)
    return Observer(config, sketch, streams, Tap(folder, digest, config))
