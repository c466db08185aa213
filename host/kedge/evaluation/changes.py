"""Finds the evaluation samples whose outputs changed most from the float model to the bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge.evaluation import decisions, groups
from kedge.evaluation.kinds import ClassifiedOutput, OutputKind
from kedge_targets import free_lengths

Array = npt.NDArray[Any]

MOST = 10
_ROWS = 64
_FEW = 3
_DEAF = frozenset({OutputKind.PASSED_THROUGH, OutputKind.EMPTY})


@dataclass(frozen=True, kw_only=True)
class OutputChange:
    """One output of one changed sample.

    Attributes:
        before, after: the float model's answer and the bundle's, in words.
        same: share of the sample's answers that are the float model's; None where the output has none.
        error: root mean square error over the root mean square of the output's numbers, of the group of channels where
            it is largest.
    """

    name: str
    before: str
    after: str
    error: float
    same: float | None = None


@dataclass(frozen=True, kw_only=True)
class Change:
    """One changed sample.

    Attributes:
        sample: index in the evaluation set.
        layer: whose rounding alone moves this sample most; None where that was not measured.
    """

    sample: int
    outputs: tuple[OutputChange, ...]
    layer: str | None = None

    @property
    def flipped(self) -> bool:
        """Return whether an answer differs."""
        return any(one.same is not None and one.same < 1 for one in self.outputs)


def largest(
    kinds: Mapping[str, ClassifiedOutput],
    outputs: Mapping[str, Array],
    reference: Mapping[str, Array],
    *,
    most: int = MOST,
) -> tuple[Change, ...]:
    """Return the samples that changed most: those with a different answer first, then those with the largest errors.
    Unchanged samples are left out.

    Args:
        kinds: what each output is.
        outputs: of the bundle, first axis the sample; its longest may be longer or shorter than the float model's.
        reference: of the float model, likewise.
    """
    names = [name for name, seen in kinds.items() if seen.kind not in _DEAF]
    if not names:
        return ()
    both = {name: free_lengths.aligned(outputs[name], reference[name]) for name in names}
    outputs, reference = ({name: pair[side] for name, pair in both.items()} for side in (0, 1))
    parted = {name: _Parted.of(outputs[name], reference[name], kinds[name]) for name in names}
    same = {
        name: decisions.agreeing(kinds[name], outputs[name], reference[name]) for name in decisions.answering(kinds)
    }
    worst = np.max(np.stack([one.worst for one in parted.values()]), axis=0)
    agreed = np.min(np.stack(list(same.values())), axis=0) if same else np.ones(len(worst))
    order = np.lexsort((np.arange(len(worst)), -worst, agreed))
    picked = [int(one) for one in order[:most] if worst[one] > 0 or agreed[one] < 1]

    def told(name: str, number: int, array: Array) -> str:
        answers = kinds[name].kind in decisions.ANSWERS
        group = groups.Group() if answers else parted[name].group(number)
        rows = group.of(reference[name])
        said = describe(kinds[name], group.of(array[number : number + 1])[0], rows)
        return f"{group.label}: {said}" if group.label else said

    return tuple(
        Change(
            sample=number,
            outputs=tuple(
                OutputChange(
                    name=name,
                    before=told(name, number, reference[name]),
                    after=told(name, number, outputs[name]),
                    same=float(same[name][number]) if name in same else None,
                    error=round(float(parted[name].worst[number]), 6),
                )
                for name in names
            ),
        )
        for number in picked
    )


@dataclass(frozen=True)
class _Parted:
    """The errors of an output's groups of channels.

    Attributes:
        errors: root mean square error of each group and sample over the root mean square of the group in all samples.
    """

    parts: list[groups.Group]
    errors: Array

    @classmethod
    def of(cls, output: Array, reference: Array, seen: ClassifiedOutput) -> _Parted:
        """Measure an output (first axis the sample) beside the float model's."""
        if reference.dtype.kind != "f":
            return cls([groups.Group()], 1.0 - decisions.shares(np.asarray(output) == np.asarray(reference))[None])
        found = groups.of(reference, bounded=seen.bounded)
        return cls(found, np.stack([_relative_errors(one, output, reference) for one in found]))

    @property
    def worst(self) -> Array:
        """Return the error of each sample in the group where it is largest."""
        found: Array = self.errors.max(axis=0)
        return found

    def group(self, sample: int) -> groups.Group:
        """Return the group where a sample's error is largest."""
        return self.parts[int(self.errors[:, sample].argmax())]


def _relative_errors(group: groups.Group, output: Array, reference: Array) -> Array:
    """Return the error of each sample in a group of channels; non-finite values count as a million."""
    count = len(reference)
    noise, signal = np.zeros(count), np.zeros(count)
    for start in range(0, count, _ROWS):
        wanted = np.asarray(group.of(reference[start : start + _ROWS]), dtype=np.float64)
        got = np.asarray(group.of(output[start : start + _ROWS]), dtype=np.float64)
        wanted, got = wanted.reshape(len(wanted), -1), got.reshape(len(got), -1)
        with np.errstate(invalid="ignore", over="ignore"):
            noise[start : start + _ROWS] = np.square(got - wanted).mean(axis=1)
        signal[start : start + _ROWS] = np.square(np.where(np.isfinite(wanted), wanted, 0.0)).mean(axis=1)
    ratio = np.sqrt(noise / (float(signal.mean()) or 1.0))
    found: Array = np.where(np.isfinite(ratio), ratio, 1e6)
    return found


def describe(seen: ClassifiedOutput, value: Array, reference: Array) -> str:
    """Describe the answer for one sample.

    Args:
        value: the output without its sample axis.
        reference: of all samples, to tell the threshold of a probability.
    """
    value = np.asarray(value)
    if seen.kind is OutputKind.CLASSES and value.ndim == 1:
        best = np.argsort(-np.nan_to_num(value.astype(np.float64), nan=-np.inf), kind="stable")[:_FEW]
        return ", ".join(f"{int(one)} ({float(value[one]):.3g})" for one in best)
    if seen.kind is OutputKind.PROBABILITY:
        edge = decisions.threshold(reference)
        number = float(value.reshape(-1)[0])
        return f"{number:.4g} ({'yes' if number > edge else 'no'}, threshold {edge:.3g})"
    if value.dtype.kind in "OUS" or value.size == 1:
        return str(value.reshape(-1)[0])
    if value.dtype.kind != "f":
        return ", ".join(str(one) for one in value.reshape(-1)[: 2 * _FEW])
    finite = value[np.isfinite(value)]
    if not finite.size:
        return "nothing finite"
    in_unit = seen.bounded and finite.min() >= 0 and finite.max() <= 1
    above = f", {int((value > decisions.HALF).sum())} above {decisions.HALF}" if in_unit else ""
    return f"{finite.min():.3g} to {finite.max():.3g}, mean {finite.mean():.3g}{above}"
