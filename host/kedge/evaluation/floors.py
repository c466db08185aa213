"""The floor for every output: below it the output counts as lost, whatever the metric and the budget say.

An output, a group of its channels, or one index along one of its axes is lost where

- it is not finite although the float model is;
- its noise is a quarter of its variation over the samples (of one index, and of class scores: nine tenths, where their
  mean would do as well), unless it is below a hundredth of the energy and what varies still follows the float model;
- less than 0.6 of the variation is left;
- of the values that stand out most (half of the largest deviation from their entry's mean) less than 0.65 is left: what
  is sparse, as scores are, has little energy to lose, and what is clipped loses little;
- of a class's answers fewer than half are still that class's.

Counts are judged by the end of their 95 % interval, so that few samples condemn nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge.evaluation import confidence_intervals
from kedge.evaluation.energies import Energies
from kedge.evaluation.groups import Group
from kedge.evaluation.kinds import ClassifiedOutput, OutputKind

Array = npt.NDArray[Any]

WHOLE = 0.25
"""Noise over variation that an output or a group may have: 6 dB."""
SLICE = 0.9
"""That one index along an axis may have; so may class scores, whose answers are counted besides."""
LEFT = 0.6
"""Of the variation that must come through: slope of a line through the origin, whatever the noise."""
FAINT = 0.01
"""Noise over energy that is healthy where an output hardly varies, as long as it follows (:data:`FOLLOWS`): 20 dB."""
FOLLOWS = 0.3
"""Correlation of the variation with the float model's."""
_CONSTANT = 1e-4
"""Deviation over magnitude below which nothing varies but float32's own noise."""
_NOTHING = 1e-10
"""What varies by less than this share of the whole output's root mean square is nothing: a dead channel's remnants,
below what float32 resolves beside the others."""
_SILENT = 0.05
"""Noise of what is constant, over the whole output's root mean square."""
PROBABILITY = 0.03
"""Error of a probability that changes nothing (root mean square)."""
_STANDS_OUT, _KEEPS, _ENOUGH = 0.5, 0.65, 4
"""What stands out, of the largest deviation; what must be left of it, and of how many at least."""
_GONE, _SOME = 0.2, 2
"""Where there are fewer: nearly nothing is left of any."""
_SHARE = 0.5
_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of an output: its label in messages, and its energies."""

    label: str
    sums: Energies
    slice: bool = False


def lost(seen: ClassifiedOutput, output: Array, reference: Array, sums: Energies, parts: list[Group]) -> str:
    """Describe why an output is lost; empty if it keeps the floor.

    Args:
        output: the candidate's answers, first axis the sample.
        reference: the float model's.
        sums: energies of every entry.
        parts: its groups of like channels.
    """
    if seen.kind is OutputKind.EMPTY:
        return ""
    if reference.dtype.kind != "f":
        return _integers(output, reference)
    whole = sums.at(None)
    if whole.broken > 0:
        return f"{int(whole.broken)} of its values are not finite where the float model's are"
    for part in [Part(label="", sums=whole), *(Part(label=p.label, sums=sums.at(p.axis, p.indices)) for p in parts)]:
        if said := _varies(seen, part, whole, bounded=seen.bounded and _in_unit(reference, parts, part.label)):
            return said
    return _along_axes(seen, output, reference, sums, whole) or _answers(seen, output, reference)


def _in_unit(reference: Array, parts: list[Group], label: str) -> bool:
    """Return whether a group (or the whole output, without a label) holds probabilities."""
    found = next((part for part in parts if part.label == label), Group())
    low, high = _range(found.of(reference), None)
    return bool(low >= 0 and high <= 1)


def _range(values: Array, axes: tuple[int, ...] | None) -> tuple[Array, Array]:
    """Return the smallest and the largest finite value."""
    finite = np.isfinite(values)
    return (
        np.min(values, axis=axes, where=finite, initial=np.inf),
        np.max(values, axis=axes, where=finite, initial=-np.inf),
    )


def _integers(output: Array, reference: Array) -> str:
    """Compare labels or indices: equal, or, for indices of the best, equal in another order."""
    same = np.asarray(output) == np.asarray(reference)
    if reference.ndim > 1:
        sorted_same = np.sort(output, axis=-1) == np.sort(reference, axis=-1)
        same = same if same.mean() >= sorted_same.mean() else sorted_same
    right = same.reshape(len(same), -1).mean(axis=1)
    if confidence_intervals.share(float(right.sum()), len(right))[1] < _SHARE:
        return f"{right.mean():.3g} of its values are the float model's"
    return ""


def _varies(seen: ClassifiedOutput, part: Part, whole: Energies, *, bounded: bool) -> str:
    """Return whether the variation over the samples is preserved."""
    sums = part.sums
    noise, variation, power = float(sums.noise), float(sums.variation), float(sums.power)
    count = max(1.0, float(sums.count))
    if noise == 0 or (bounded and noise / count <= PROBABILITY**2):
        return ""
    faint = noise <= FAINT * power
    usual = float(whole.power) / max(1.0, float(whole.count))
    if variation <= _CONSTANT**2 * power or variation / count <= _NOTHING**2 * usual:
        silent = noise / count <= _SILENT**2 * usual
        return "" if faint or silent else f"{_named(part)}never varied, and now has noise of {_db(noise, power)}"
    allowed = SLICE if part.slice or seen.kind is OutputKind.CLASSES else WHOLE
    correlation = float(sums.shared) / np.sqrt(max(variation * float(sums.varied), 1e-300))
    if noise > allowed * variation and not (faint and correlation >= FOLLOWS):
        share = noise / variation
        return f"{_named(part)}its noise is {share:.2g} of what it varies over the samples ({_db(noise, power)})"
    left = float(sums.shared) / variation
    if left + np.sqrt(noise / variation / count) < LEFT:
        return f"{_named(part)}{max(0.0, left):.2g} is left of what it varies over the samples ({_db(noise, power)})"
    return ""


def _db(noise: float, power: float) -> str:
    return f"{10 * np.log10(max(power, 1e-300) / noise):.1f} dB"


def _named(part: Part) -> str:
    return f"{part.label}: " if part.label else ""


def _along_axes(seen: ClassifiedOutput, output: Array, reference: Array, sums: Energies, whole: Energies) -> str:
    """Check every index along every axis separately."""
    shape = sums.count.shape
    mean = _mean(reference)
    if said := _stand_out(seen, "", output, reference, mean, whole, axis=None):
        return said
    for axis in range(1, len(shape) + 1):
        if shape[axis - 1] < 2:
            continue
        along = sums.along(axis)
        others = tuple(place for place in range(reference.ndim) if place != axis)
        low, high = _range(reference, others)
        for index in np.argsort(-_ratio(along))[:_MOST]:
            one = along.at(1, (int(index),))
            bounded = bool(seen.bounded and low[index] >= 0 and high[index] <= 1)
            part = Part(label=f"axis {axis}, index {index}", sums=one, slice=True)
            if said := _varies(seen, part, whole, bounded=bounded):
                return said
        if said := _stand_out(seen, f"axis {axis}, index ", output, reference, mean, along, axis=axis):
            return said
    return ""


_MOST = 10_000
"""Indices along one axis that are looked at, those with the most noise first."""


def _ratio(along: Energies) -> Array:
    found: Array = along.noise / np.maximum(along.variation, 1e-300)
    return found


def _mean(reference: Array) -> Array:
    finite = np.isfinite(reference)
    found: Array = np.where(finite, reference, 0).sum(axis=0, dtype=np.float64) / np.maximum(finite.sum(axis=0), 1)
    return found


def _stand_out(
    seen: ClassifiedOutput,
    label: str,
    output: Array,
    reference: Array,
    mean: Array,
    sums: Energies,
    *,
    axis: int | None,
) -> str:
    """Return whether the values that stand out most still do; along an axis, at each index.

    Args:
        sums: energies of each index; of the whole output without an axis.
    """
    others = tuple(place for place in range(reference.ndim) if place != axis)
    peak: Array = np.zeros(())
    for _, _, off in _deviations(output, reference, mean):
        peak = np.maximum(peak, np.abs(off).max(axis=others, keepdims=True))
    nothing = _NOTHING * np.sqrt(sums.power.sum() / max(1.0, float(sums.count.sum())))
    number = much = left = np.zeros(())
    for got, wanted, off in _deviations(output, reference, mean):
        strong = (
            (np.abs(off) >= _STANDS_OUT * peak) & (np.abs(off) > _CONSTANT * np.abs(wanted)) & (np.abs(off) > nothing)
        )
        if seen.bounded:
            strong &= ~((peak < PROBABILITY) & (wanted >= 0) & (wanted <= 1))
        number = number + strong.sum(axis=others)
        much = much + np.where(strong, np.abs(off), 0.0).sum(axis=others)
        left = left + np.where(strong, (got - mean) * np.sign(off), 0.0).sum(axis=others)
    share = left / np.maximum(much, 1e-300)
    spread = np.sqrt(sums.noise / np.maximum(sums.count, 1) * number) / np.maximum(much, 1e-300)
    gone = ((number >= _ENOUGH) & (share + spread < _KEEPS)) | ((number >= _SOME) & (share + spread < _GONE))
    gone &= ~((sums.noise > WHOLE * sums.variation) & (sums.noise <= FAINT * sums.power))
    if not gone.any():
        return ""
    index = int(np.argmin(np.where(gone, share, np.inf)))
    where = "" if axis is None else f"{label}{index}: "
    kept = max(0.0, float(np.ravel(share)[index]))
    return f"{where}{kept:.2g} is left of its {int(np.ravel(number)[index])} values that stand out most"


def _deviations(output: Array, reference: Array, mean: Array) -> Any:
    """The candidate's values, the float model's, and how far those lie from their entry's mean; in pieces."""
    step = max(1, _BYTES // max(1, 8 * reference[:1].size))
    for start in range(0, len(reference), step):
        wanted = np.asarray(reference[start : start + step], dtype=np.float64)
        got = np.asarray(output[start : start + step], dtype=np.float64)
        usable = np.isfinite(wanted) & np.isfinite(got)
        wanted, got = np.where(usable, wanted, mean), np.where(usable, got, mean)
        yield got, wanted, wanted - mean


def _answers(seen: ClassifiedOutput, output: Array, reference: Array) -> str:
    """Return whether each class among the float model's answers still occurs."""
    if seen.kind is not OutputKind.CLASSES or reference.ndim < 2:
        return ""
    wanted, got = np.argmax(reference, axis=-1).ravel(), np.argmax(output, axis=-1).ravel()
    for one in np.unique(wanted):
        mine = wanted == one
        right = int((got[mine] == one).sum())
        if confidence_intervals.share(right, int(mine.sum()))[1] < _SHARE:
            return f"class {one}: {right} of the float model's {int(mine.sum())} answers are left"
    return ""
