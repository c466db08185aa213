"""Finds the real axes and their order in a converted file by running it, not from its shapes alone.

onnx2tf moves axes, and if sizes repeat (square pictures, sequences as long as they are wide) shapes do not show how. So
every order of axes that fits the shapes is tried on real samples and on noise, and the one that reproduces the ONNX
graph's results is used.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_targets.contract import Session
from kedge_targets.graph.signature import TensorInfo

Array = npt.NDArray[Any]
Permutation = tuple[int, ...]

_CLOSE = 1e-4  # so close that no better is looked for
_MOST_RUNS = 256
_CHANNELS_LAST = {3: (0, 2, 1), 4: (0, 2, 3, 1), 5: (0, 2, 3, 4, 1)}


@dataclass(frozen=True)
class Match:
    """The mapping of the file's tensors to the model's.

    Attributes:
        inputs: permutation for each input of the model: ``file = model.transpose(permutation)``.
        outputs: position in the file and permutation for each output of the model, likewise.
        error: root mean square of the difference, relative to the reference's, for the worst output.
        off: likewise, but relative to the output's floor where it lies below.
        worst: the output with the largest ``off``.
    """

    inputs: tuple[Permutation, ...]
    outputs: tuple[tuple[int, Permutation], ...]
    error: float
    off: float = 0.0
    worst: int = 0


@dataclass(frozen=True)
class Probe:
    """One run of the ONNX graph: inputs and outputs in the model's order."""

    inputs: Sequence[Array]
    outputs: Sequence[Array]


def permutations(model: Sequence[int], file: Sequence[int]) -> list[Permutation]:
    """Return every order of axes that turns the model's shape into the file's, likely ones first; the batch stays in
    front. Orders that only exchange axes of size 1 are the same data and count as one."""
    rank = len(model)
    if rank != len(file):
        return []
    if rank < 2:
        return [tuple(range(rank))] if tuple(model) == tuple(file) else []
    orders = [(0, *rest) for rest in itertools.permutations(range(1, rank))] if rank <= 6 else [tuple(range(rank))]
    first = [tuple(range(rank)), _CHANNELS_LAST.get(rank, tuple(range(rank)))]
    orders.sort(key=lambda order: first.index(order) if order in first else len(first))
    found: dict[Permutation, Permutation] = {}
    for order in orders:
        if [model[axis] for axis in order] == list(file):
            found.setdefault(tuple(axis for axis in order if model[axis] != 1), order)
    return list(found.values())


def match(
    session: Session,
    file_inputs: Sequence[Sequence[int]],
    order: Sequence[int],
    probes: Sequence[Probe],
    *,
    floors: Sequence[float] = (),
) -> Match | None:
    """Return the best match, or None if no order of axes fits the shapes.

    Args:
        session: session of the float file.
        file_inputs: shapes of the file's inputs, in the file's order.
        order: position in the file of each input of the model.
        probes: runs of the ONNX graph.
        floors: for each output what it is compared with at least, where its numbers are smaller.
    """
    choices = [
        permutations(array.shape, file_inputs[position])
        for array, position in zip(probes[0].inputs, order, strict=True)
    ]
    best: Match | None = None
    for chosen in itertools.islice(itertools.product(*choices), _MOST_RUNS):
        found = _tried(session, chosen, order, probes, floors)
        if found is not None and (best is None or found.error < best.error):
            best = found
        if best is not None and best.error < _CLOSE:
            break
    return best


def _tried(
    session: Session,
    chosen: Sequence[Permutation],
    order: Sequence[int],
    probes: Sequence[Probe],
    floors: Sequence[float],
) -> Match | None:
    answers = []
    for probe in probes:
        given: list[Any] = [None] * len(order)
        for array, permutation, position in zip(probe.inputs, chosen, order, strict=True):
            given[position] = np.ascontiguousarray(array.transpose(permutation))
        answers.append(session.run(given))
    outputs: list[tuple[int, Permutation]] = []
    errors, offs = [], []
    for index in range(len(probes[0].outputs)):
        options = [
            (_error(probes, answers, index, position, permutation), position, permutation)
            for position, answer in enumerate(answers[0])
            if position not in {taken for taken, _ in outputs}
            for permutation in permutations(probes[0].outputs[index].shape, answer.shape)
        ]
        if not options:
            return None
        error, position, permutation = min(options, key=lambda option: option[0])
        outputs.append((position, permutation))
        floor = floors[index] if index < len(floors) else 0.0
        errors.append(error)
        offs.append(_error(probes, answers, index, position, permutation, floor=floor))
    off = max(offs, default=0.0)
    return Match(tuple(chosen), tuple(outputs), max(errors, default=0.0), off, offs.index(off) if offs else 0)


def _error(
    probes: Sequence[Probe],
    answers: Sequence[Sequence[Array]],
    index: int,
    position: int,
    permutation: Permutation,
    *,
    floor: float = 0.0,
) -> float:
    worst = 0.0
    for probe, answer in zip(probes, answers, strict=True):
        expected = probe.outputs[index].transpose(permutation).astype(np.float64)
        got = answer[position].astype(np.float64)
        scale = max(math.sqrt(float(np.mean(expected**2))), floor) or 1.0
        error = math.sqrt(float(np.mean((got - expected) ** 2))) / scale
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def made_up(tensors: Sequence[TensorInfo]) -> dict[str, Array]:
    """Return an artificial sample if none is given: standard normal noise, zeros for integers; a dynamic batch is 1."""
    source = np.random.default_rng(0)
    made: dict[str, Array] = {}
    for info in tensors:
        shape = [axis or 1 for axis in info.shape]
        noise = source.normal(size=shape) if info.dtype.startswith("float") else np.zeros(shape)
        made[info.name] = noise.astype(info.dtype)
    return made


def noise_like(sample: Mapping[str, Array], seed: int) -> dict[str, Array]:
    """Return noise with a sample's own mean and spread: real samples may be so regular that orders of axes look alike.
    Integers (indices) are shuffled instead, so that they stay in their range."""
    source = np.random.default_rng(seed)
    made: dict[str, Array] = {}
    for name, array in sample.items():
        if array.dtype.kind == "f":
            spread = float(array.std()) or 1.0
            made[name] = source.normal(float(array.mean()), spread, array.shape).astype(array.dtype)
        else:
            made[name] = source.permutation(array.reshape(-1)).reshape(array.shape)
    return made
