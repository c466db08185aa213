"""Compares a shadow's answers with those of the bundle that serves, in bounded numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_agent.samples.single import are_scores, confidence
from kedge_protocol import latency_buckets
from kedge_protocol.bundle.config import TensorSpec
from kedge_protocol.messages import ShadowTelemetry

Array = npt.NDArray[Any]

MAX_CLASSES = 64
OTHER = "other"
_NEAR = 0.1
"""Deviation, as a share of the old answer's root mean square, up to which numbers are alike; of a single number between
0 and 1, such as a probability, the deviation itself: relative to a small one, two good models are far apart."""


@dataclass
class Figures:
    """Counts since they were last sent."""

    compared: int = 0
    agreed: int = 0
    classes: dict[str, list[int]] = field(default_factory=dict)
    confidence_shift: float = 0.0
    old: list[int] = field(default_factory=lambda: [0] * latency_buckets.BUCKETS)
    new: list[int] = field(default_factory=lambda: [0] * latency_buckets.BUCKETS)
    errors: int = 0

    def add(self, specs: Sequence[TensorSpec], old: Mapping[str, Array], new: Mapping[str, Array]) -> Array | None:
        """Compare the answers to one call: output's name → array with the samples along the first axis.

        Returns:
            Which samples both answer alike, bool [samples]; None without outputs.
        """
        alike: Array | None = None
        for spec in specs:
            before, after = old[spec.name], new[spec.name]
            if before.shape != after.shape:
                same = np.zeros(len(before), bool)
            elif before.dtype.kind != "f":
                same = _equal(before, after)
            elif are_scores(before):
                same = self._scores(before, after)
            else:
                same = _near(before, after)
            alike = same if alike is None else alike & same
        if alike is not None:
            self.compared += len(alike)
            self.agreed += int(alike.sum())
        return alike

    def message(self, digest: str) -> ShadowTelemetry:
        """Return the counts as they are sent."""
        return ShadowTelemetry(
            digest=digest,
            compared=self.compared,
            agreed=self.agreed,
            classes={name: tuple(counts) for name, counts in self.classes.items()},
            confidence_shift=float(self.confidence_shift) if np.isfinite(self.confidence_shift) else 0.0,
            old_buckets=latency_buckets.sparse(self.old),
            new_buckets=latency_buckets.sparse(self.new),
            errors=self.errors,
        )

    def _scores(self, before: Array, after: Array) -> Array:
        classes, answers = before.argmax(axis=1), after.argmax(axis=1)
        same: Array = classes == answers
        for name, agrees in zip(map(str, classes.tolist()), same.tolist(), strict=True):
            key = name if name in self.classes or len(self.classes) < MAX_CLASSES else OTHER
            counts = self.classes.setdefault(key, [0, 0])
            counts[0] += 1
            counts[1] += agrees
        self.confidence_shift += float((confidence(after) - confidence(before)).sum())
        return same


def _equal(before: Array, after: Array) -> Array:
    """Classes as integers or names, of a sample or of its pixels: the number beside one is another class."""
    equal = before.reshape(len(before), -1) == after.reshape(len(after), -1)
    same: Array = equal.mean(axis=1) >= 1 - _NEAR
    return same


def _near(before: Array, after: Array) -> Array:
    rows, others = (one.reshape(len(one), -1).astype(np.float64) for one in (before, after))
    apart = np.sqrt(np.square(others - rows).mean(axis=1))
    scale = np.sqrt(np.square(rows).mean(axis=1))
    if rows.shape[1] == 1:
        whole = (np.minimum(rows, others) >= 0) & (np.maximum(rows, others) <= 1)
        scale = np.where(whole[:, 0], 1.0, scale)
    near: Array = apart <= _NEAR * scale
    return near
