"""The metrics that ``--metric`` knows by name.

To add one: write a class of :class:`kedge.evaluation.metrics.contract.Metric` and put its module's ``METRICS`` into
:data:`_MODULES`.
"""

from __future__ import annotations

import functools
import importlib

from kedge.evaluation.metrics.contract import Direction, Metric
from kedge_protocol.errors import ConfigError
from kedge_protocol.spelling import known_names

__all__ = ["Direction", "Metric", "find", "known"]

_MODULES = ("classes", "likeness", "classification", "regression", "segmentation", "text", "detection")
"""Modules of this package; each has ``METRICS``, a tuple of classes."""


@functools.cache
def known() -> dict[str, type[Metric]]:
    """Name → metric, in alphabetical order."""
    found: dict[str, type[Metric]] = {}
    for module in _MODULES:
        for metric in importlib.import_module(f"{__name__}.{module}").METRICS:
            found[metric.name] = metric
    return dict(sorted(found.items()))


def find(name: str, *, where: str) -> type[Metric]:
    """A metric by its name.

    Raises:
        ConfigError: there is none; the message lists the known ones.
    """
    metric = known().get(name)
    if metric is None:
        raise ConfigError(
            f"there is no metric {name!r}",
            where=where,
            remedy=f"{known_names(name, known())}; your own is file.py:function",
        )
    return metric
