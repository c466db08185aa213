"""The other bundles to which a pipeline passes its results, opened from their folders: for a bundle's examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kedge_protocol.bundle.config import BundleConfig
from kedge_protocol.errors import InputError
from kedge_targets.executor import Executor
from kedge_targets.pipeline.execution import Runner
from kedge_targets.pipeline.others import Neighbour


class Neighbours:
    """Opens other bundles at their first use.

    Args:
        found: the bundles, by the model's name.
        read: reads a configuration.
    """

    def __init__(self, found: Mapping[str, Neighbour], read: Callable[[Path], BundleConfig]) -> None:
        self.digests = {name: one.digest for name, one in found.items()}
        self._found = found
        self._read = read
        self._opened: dict[str, tuple[Executor, Callable[[Any], Any]]] = {}

    def __call__(self, name: str) -> Callable[[Any], Any]:
        """Return a model as a function from raw data to its answer.

        Raises:
            InputError: it is not here, or has no pipeline, or goes on to further models.
            KedgeError: its runtime refuses it.
        """
        if name not in self._opened:
            one = self._found.get(name)
            config = None if one is None else self._read(Path(one.config))
            runner = None if one is None or config is None else Runner.of(Path(one.folder), config)
            if one is None or config is None or runner is None or runner.pipeline.then is not None:
                raise InputError(f"the model {name!r} is not here, or cannot be the last of a row")
            executor = Executor.of(Path(one.folder), config)
            self._opened[name] = executor, lambda item: runner(item, executor)
        return self._opened[name][1]

    def close(self) -> None:
        """Release what was opened."""
        for executor, _ in self._opened.values():
            executor.close()
        self._opened.clear()
