"""Computes the values that drift sketches count, on the host for the baseline and on the device for live samples."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.bundle.config import TensorSpec
from kedge_protocol.drift import MAX_BINS, MAX_STREAMS, Kind, Statistic, Stream

Array = npt.NDArray[Any]

ELEMENTS = 4096
"""Largest number of a sample's elements that are looked at, evenly spaced."""
BINS = 10
"""Bins of equal population, as is usual for the index."""
_SAMPLES_A_BIN = 5
_DIGITS = 4


def values(statistic: Statistic, batch: Array) -> Array:
    """Return one number for each sample, float64 [samples].

    Args:
        batch: samples along the first axis.
    """
    rows: Array = batch.reshape(len(batch), -1)
    found: Array
    if statistic is Statistic.CLASS:
        found = rows.argmax(axis=1)
    elif statistic in (Statistic.TOP, Statistic.SOFTMAX):
        rows = rows.astype(np.float64)
        found = rows.max(axis=1)
        if statistic is Statistic.SOFTMAX:
            found = 1.0 / np.exp(rows - found[:, None]).sum(axis=1)
    else:
        rows = rows[:, :: max(1, -(-rows.shape[1] // ELEMENTS))].astype(np.float32)
        found = rows.mean(axis=1) if statistic is Statistic.MEAN else rows.std(axis=1)
    return found.astype(np.float64)


def digests(batch: Mapping[str, Array], most: int) -> list[bytes]:
    """Return a hash of each of the first samples' inputs, of the elements that are looked at.

    Args:
        batch: input → samples along the first axis; of one without a batch, the first one belongs to all.
    """
    parts = [one.reshape(len(one), -1)[:most] for one in batch.values()]
    steps = [part[:, :: max(1, -(-part.shape[1] // ELEMENTS))] for part in parts]
    return [
        hashlib.blake2b(b"".join(_content(part[min(place, len(part) - 1)]) for part in steps), digest_size=8).digest()
        for place in range(max((len(part) for part in steps), default=0))
    ]


def _content(row: Array) -> bytes:
    """Return a row's bytes; of texts without what fills them up to the longest of their batch."""
    return "\0".join(row.tolist()).encode("utf-8", "surrogatepass") if row.dtype.kind == "U" else row.tobytes()


class Baseline:
    """Collects the baseline of a bundle, some samples at a time.

    Args:
        inputs, outputs: the bundle's.
    """

    def __init__(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
        self._inputs, self._outputs = inputs, outputs
        self._values: dict[tuple[Kind, str, Statistic], list[Array]] = {}
        self._classes: dict[str, int] = {}
        self._scores: set[str] = set()
        """Outputs that are no probabilities."""

    def add(self, samples: Mapping[str, Array], answers: Mapping[str, Array]) -> None:
        """Add samples: tensor's name → array with the samples along the first axis."""
        for spec in self._inputs:
            for statistic in (Statistic.MEAN, Statistic.SPREAD):
                self._note(Kind.INPUT, spec, statistic, samples[spec.name])
        for spec in self._outputs:
            array = answers[spec.name]
            if array.ndim != 2 or array.shape[1] < 2 or array.dtype.kind != "f":
                for statistic in (Statistic.MEAN, Statistic.SPREAD):
                    self._note(Kind.OUTPUT, spec, statistic, array)
                continue
            self._classes[spec.name] = int(array.shape[1])
            if not _are_probabilities(array):
                self._scores.add(spec.name)
            self._note(Kind.OUTPUT, spec, Statistic.CLASS, array)
            for statistic in (Statistic.TOP, Statistic.SOFTMAX):
                self._note(Kind.CONFIDENCE, spec, statistic, array)

    def streams(self) -> tuple[Stream, ...]:
        """Return the baseline; a tensor that is the same for all samples has no stream."""
        found = []
        for (kind, tensor, statistic), parts in self._values.items():
            if statistic is (Statistic.TOP if tensor in self._scores else Statistic.SOFTMAX):
                continue
            numbers = np.concatenate(parts)
            numbers = numbers[np.isfinite(numbers)]
            edges = self._edges(tensor, statistic, numbers)
            if len(edges):
                counts = np.bincount(np.searchsorted(edges, numbers, side="right"), minlength=len(edges) + 1)
                found.append(
                    Stream(
                        kind=kind,
                        tensor=tensor,
                        statistic=statistic,
                        edges=tuple(map(float, edges)),
                        counts=tuple(map(int, counts)),
                    )
                )
        return tuple(found[:MAX_STREAMS])

    def _note(self, kind: Kind, spec: TensorSpec, statistic: Statistic, array: Array) -> None:
        if array.dtype.kind in "fiub" and array.size and spec.batched:
            self._values.setdefault((kind, spec.name, statistic), []).append(values(statistic, array))

    def _edges(self, tensor: str, statistic: Statistic, numbers: Array) -> Array:
        if statistic is Statistic.CLASS:
            classes = self._classes[tensor]
            steps: Array = np.unique(np.linspace(0, classes, min(classes, MAX_BINS) + 1)[1:-1].round() - 0.5)
            return steps
        bins = min(BINS, len(numbers) // _SAMPLES_A_BIN)
        if bins < 2:
            return np.empty(0)
        # Rounded, so that the last bits of a runtime do not make another bundle.
        cuts = np.quantile(numbers, np.arange(1, bins) / bins)
        edges: Array = np.unique([float(f"{cut:.{_DIGITS}g}") for cut in cuts])
        inside: Array = edges[(edges > numbers.min()) & (edges <= numbers.max())]
        return inside


def _are_probabilities(array: Array) -> bool:
    sums = array.sum(axis=1, dtype=np.float64)
    return bool(np.all(array >= 0) and np.allclose(sums, 1.0, atol=0.02))
