"""Every output of a candidate held against the float model's: its figures, and whether it keeps the floor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge.evaluation import decisions, energies, floors, groups
from kedge.evaluation.energies import Energies
from kedge.evaluation.kinds import ClassifiedOutput, OutputKind
from kedge.evaluation.metrics.likeness import cosines

Array = npt.NDArray[Any]

EXACT_DB = 150.0
"""Above it float32 itself is the noise; what is exact has it."""


@dataclass(frozen=True, kw_only=True)
class PartFigures:
    """Channels of like range within an output.

    Attributes:
        label: ``axis 1: 0-3``.
        sqnr_db, cosine: as of :class:`OutputFigures`.
    """

    label: str
    sqnr_db: float
    cosine: float


@dataclass(frozen=True, kw_only=True)
class Flips:
    """Decisions at a threshold.

    Attributes:
        above: share of values that the float model has above it.
        flipped: share that lie on the other side.
    """

    threshold: float
    above: float
    flipped: float


@dataclass(frozen=True, kw_only=True)
class OutputFigures:
    """One output over all evaluation samples, beside the float model's; what has no meaning is None.

    Attributes:
        kind: what it is, ``why``: how that is known.
        sqnr_db: signal to quantization noise, within ±:data:`EXACT_DB`; ``variation_db`` against the variation over the
            samples alone.
        cosine: mean over the samples; ``worst_cosine`` of sample ``worst_sample``.
        mean_error, largest_error: absolute.
        agreement: share of samples whose answers are the float model's.
        parts: groups of channels whose ranges differ; none where there is but one.
        worst: the index along an axis with the most noise for its variation, and how much that is in dB.
        flips: of probabilities.
        lost: why it is below the floor; empty where it is not.
    """

    name: str
    kind: OutputKind
    why: str
    sqnr_db: float | None = None
    variation_db: float | None = None
    cosine: float | None = None
    worst_cosine: float | None = None
    worst_sample: int | None = None
    mean_error: float | None = None
    largest_error: float | None = None
    agreement: float | None = None
    parts: tuple[PartFigures, ...] = ()
    worst: str = ""
    flips: tuple[Flips, ...] = ()
    lost: str = ""


def judge(
    kinds: Mapping[str, ClassifiedOutput], outputs: Mapping[str, Array], reference: Mapping[str, Array]
) -> tuple[OutputFigures, ...]:
    """Figures and floors of all outputs, in the model's order.

    Args:
        outputs: the candidate's, by name, first axis the sample.
        reference: the float model's.
    """
    return tuple(one(kinds[name], outputs[name], reference[name]) for name in reference)


def one(seen: ClassifiedOutput, output: Array, reference: Array) -> OutputFigures:
    """Of one output."""
    if output.shape != reference.shape:
        said = f"its shape is {'x'.join(map(str, output.shape))}, not {'x'.join(map(str, reference.shape))}"
        return OutputFigures(name=seen.name, kind=seen.kind, why=seen.why, lost=said)
    if seen.kind is OutputKind.EMPTY:
        return OutputFigures(name=seen.name, kind=seen.kind, why=seen.why)
    if reference.dtype.kind != "f":
        same = float(np.mean(decisions.shares(np.asarray(output) == np.asarray(reference))))
        return OutputFigures(
            name=seen.name,
            kind=seen.kind,
            why=seen.why,
            agreement=round(same, 9),
            lost=floors.lost(seen, output, reference, energies.NOTHING, []),
        )
    return _floats(seen, output, reference)


def _floats(seen: ClassifiedOutput, output: Array, reference: Array) -> OutputFigures:
    sums = energies.measure(output, reference)
    parts = groups.of(reference, bounded=seen.bounded)
    parts = parts if len(parts) > 1 else []
    alike = cosines(output, reference, groups.Group())
    agreement = None
    if seen.kind in decisions.ANSWERS:
        agreement = round(float(np.mean(decisions.agreeing(seen, output, reference))), 9)
    whole = sums.at(None)
    mean_error, largest_error = _errors(output, reference)
    return OutputFigures(
        name=seen.name,
        kind=seen.kind,
        why=seen.why,
        sqnr_db=_db(float(whole.power), float(whole.noise), broken=float(whole.broken)),
        variation_db=_db(float(whole.variation), float(whole.noise), broken=float(whole.broken)),
        cosine=None if reference[:1].size == 1 else round(float(alike.mean()), 9),
        worst_cosine=None if reference[:1].size == 1 else round(float(alike.min()), 9),
        worst_sample=None if reference[:1].size == 1 else int(alike.argmin()),
        mean_error=mean_error,
        largest_error=largest_error,
        agreement=agreement,
        parts=tuple(
            PartFigures(
                label=part.label,
                sqnr_db=_of(sums.at(part.axis, part.indices)),
                cosine=round(float(cosines(output, reference, part).mean()), 9),
            )
            for part in parts
        ),
        worst=_worst(sums),
        flips=_flips(output, reference) if seen.bounded else (),
        lost=floors.lost(seen, output, reference, sums, parts),
    )


def _of(sums: Energies) -> float:
    return _db(float(sums.power), float(sums.noise), broken=float(sums.broken))


def _db(signal: float, noise: float, *, broken: float) -> float:
    if broken or not np.isfinite(noise):
        return -EXACT_DB
    if noise == 0.0:
        return EXACT_DB
    if signal == 0.0:
        return -EXACT_DB
    return round(float(np.clip(10.0 * np.log10(signal / noise), -EXACT_DB, EXACT_DB)), 3)


def _errors(output: Array, reference: Array) -> tuple[float | None, float | None]:
    total = largest = number = 0.0
    for start in range(0, len(reference), _ROWS):
        wanted = np.asarray(reference[start : start + _ROWS], dtype=np.float64)
        got = np.asarray(output[start : start + _ROWS], dtype=np.float64)
        usable = np.isfinite(wanted) & np.isfinite(got)
        apart = np.abs(np.where(usable, got, 0.0) - np.where(usable, wanted, 0.0))
        total, number = total + float(apart.sum()), number + float(usable.sum())
        largest = max(largest, float(apart.max(initial=0.0)))
    return (float(f"{total / number:.6g}"), float(f"{largest:.6g}")) if number else (None, None)


_ROWS = 256


def _worst(sums: Energies) -> str:
    """The index that is worst for its variation, where anything varies."""
    found = (float("inf"), "")
    for axis in range(1, sums.count.ndim + 1):
        if sums.count.shape[axis - 1] < 2:
            continue
        along = sums.along(axis)
        varies = along.variation > 0
        if varies.any():
            ratio = np.where(varies, along.noise / np.where(varies, along.variation, 1.0), -1.0)
            index = int(ratio.argmax())
            db = _db(float(along.variation[index]), float(along.noise[index]), broken=0.0)
            found = min(found, (db, f"axis {axis}, index {index}: {db:.1f} dB"))
    return found[1]


def _flips(output: Array, reference: Array) -> tuple[Flips, ...]:
    """At 0.5, and where the float model's own values divide, if that is elsewhere; of what lies within 0..1."""
    wanted = np.asarray(reference, dtype=np.float64).ravel()
    got = np.asarray(output, dtype=np.float64).ravel()
    unit = np.isfinite(wanted) & (wanted >= 0) & (wanted <= 1)
    wanted, got = wanted[unit], got[unit]
    if not wanted.size:
        return ()
    told = []
    for edge in sorted({decisions.HALF, decisions.threshold(wanted)}):
        above = wanted > edge
        flipped = float(np.mean(above != (got > edge)))
        told.append(Flips(threshold=round(edge, 6), above=round(float(np.mean(above)), 9), flipped=round(flipped, 9)))
    return tuple(told)
