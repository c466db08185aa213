"""Kedge's compression steps, one file each, and the lookup of third-party steps (entry points of the group
``kedge.steps``)."""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import Any

from kedge.step import Step
from kedge_protocol.errors import ConfigError
from kedge_protocol.spelling import known_names

GROUP = "kedge.steps"

_OWN: dict[str, str] = {
    "equalize": "equalize:Equalize",
    "split-outliers": "split_outliers:SplitOutliers",
    "compensate-rounding": "compensate_rounding:CompensateRounding",
    "correct-bias": "correct_bias:CorrectBias",
    "drop-dead-channels": "drop_dead_channels:DropDeadChannels",
    "prune-channels": "prune_channels:PruneChannels",
    "prune-heads": "prune_heads:PruneHeads",
    "prune-width": "prune_width:PruneWidth",
    "drop-layers": "drop_layers:DropLayers",
    "sparsify": "sparsify:Sparsify",
    "distil": "distil:Distil",
    "fine-tune": "fine_tune:FineTune",
}
"""Name in a recipe → module and class."""


def names() -> list[str]:
    """Return the names of all available steps, sorted."""
    return sorted({*_OWN, *(point.name for point in metadata.entry_points(group=GROUP))})


def find(name: str) -> type[Step[Any]]:
    """Return a step's class by its name in a recipe; Kedge's own steps come first.

    Raises:
        ConfigError: unknown, or the third party's cannot be loaded.
    """
    if name in _OWN:
        module, _, attribute = _OWN[name].partition(":")
        found: type[Step[Any]] = getattr(importlib.import_module(f"kedge.steps.{module}"), attribute)
        return found
    for point in metadata.entry_points(group=GROUP):
        if point.name == name:
            return _loaded(point)
    raise ConfigError(f"there is no step {name!r}", where="recipe", remedy=known_names(name, names()))


def _loaded(point: metadata.EntryPoint) -> type[Step[Any]]:
    try:
        found = point.load()
    except Exception as error:  # whatever the third party's module raises
        raise ConfigError(f"step {point.name!r} cannot be loaded: {error}", where=point.value) from error
    if not (isinstance(found, type) and issubclass(found, Step)):
        raise ConfigError(f"step {point.name!r} is no kedge.step.Step", where=point.value)
    return found
