"""Golden vectors: a device runs them to verify a bundle before it serves.

One ``.npz`` (no pickles; members carry no times, so equal vectors have equal bytes)::

    in/<input name>      raw samples, before preprocessing, sample axis first
    out/<output name>    float outputs expected of this very file
    tol/<output name>    float64 [max_abs, rms]: the largest allowed deviation of one element, and of the root mean
                         square over all elements
    code/<input name>    bytes: in/ holds codes (:class:`kedge_protocol.golden_coding.CodedInput`) if the samples
                         themselves would be too large
    own/<input name>     int64 [samples, rank]: the shape of each sample, where in/ holds them filled up to the longest
    shape/<output name>  int64, of one sample: out/ holds checksums (:func:`kedge_protocol.golden_coding.checksums`)
                         if the outputs themselves would be too large

The tolerance is *measured*: at compile time every kernel set that the target may use runs the file, and the
tolerance is the largest deviation seen plus a margin (see ``kedge.evaluation.golden``).
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.errors import BundleError, VerificationError
from kedge_protocol.golden_coding import CodedInput, checksums
from kedge_protocol.npz import UNREADABLE

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Tolerance:
    """The allowed deviation of one output, in the output's own unit."""

    max_abs: float
    rms: float


@dataclass(frozen=True)
class Golden:
    """Inputs, expected outputs and tolerances, each by tensor name.

    Attributes:
        coded: the inputs that are stored in a compact form.
        own: the shape of each sample, for inputs whose samples differ in length: the rest of each is filled up.
        shapes: the shape of one sample, for outputs of which ``outputs`` has only checksums.
    """

    inputs: dict[str, Array]
    outputs: dict[str, Array]
    tolerances: dict[str, Tolerance]
    coded: dict[str, CodedInput] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    own: dict[str, Array] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """The number of vectors."""
        return int(next(iter(self.inputs.values())).shape[0])

    def picked(self, rows: Sequence[int]) -> Golden:
        """Return some of the vectors, without expectations."""
        inputs, own = ({name: one[list(rows)] for name, one in part.items()} for part in (self.inputs, self.own))
        return Golden(inputs, {}, {}, own=own)

    def calls(self, step: int) -> Iterator[dict[str, Array]]:
        """Yield the inputs of one call after another: ``step`` vectors each, or one where vectors differ in length."""
        step = 1 if self.own else step
        for index in range(0, self.samples, step):
            yield {name: self._of_call(name, array[index : index + step], index) for name, array in self.inputs.items()}

    def _of_call(self, name: str, array: Array, index: int) -> Array:
        if name not in self.own:
            return array
        return array[(slice(None), *(slice(int(size)) for size in self.own[name][index]))]


@dataclass(frozen=True)
class Deviation:
    """The measured deviation of one output from its golden vectors."""

    output: str
    max_abs: float
    rms: float
    tolerance: Tolerance

    @property
    def holds(self) -> bool:
        """Whether the deviation is within the tolerance; NaN never is."""
        return self.max_abs <= self.tolerance.max_abs and self.rms <= self.tolerance.rms


def deviation(expected: Array, actual: Array) -> tuple[float, float]:
    """Return ``(max_abs, rms)`` of the difference in float64.

    Raises:
        VerificationError: the shapes differ.
    """
    if expected.shape != actual.shape:
        raise VerificationError(f"gave shape {actual.shape}, {expected.shape} was expected")
    if expected.size == 0:
        return 0.0, 0.0
    difference = actual.astype(np.float64) - expected.astype(np.float64)
    return float(np.abs(difference).max()), float(np.sqrt(np.mean(difference**2)))


def compare(golden: Golden, actual: dict[str, Array]) -> list[Deviation]:
    """Measure the deviation of each output.

    Raises:
        VerificationError: an output is missing or has another shape.
    """
    found = []
    for name, expected in golden.outputs.items():
        if name not in actual:
            raise VerificationError(f"output {name!r} is missing")
        given = actual[name]
        if name in golden.shapes:
            if given.shape != (len(expected), *golden.shapes[name]):
                raise VerificationError(f"gave shape {given.shape}, {golden.shapes[name]} was expected of each sample")
            given = checksums(given, expected.shape[1])
        largest, rms = deviation(expected, given)
        found.append(Deviation(name, largest, rms, golden.tolerances[name]))
    return found


def require(deviations: list[Deviation], *, where: str) -> None:
    """Raise :class:`VerificationError` naming the worst output unless all match."""
    bad = [d for d in deviations if not d.holds]
    if bad:
        worst = max(bad, key=lambda d: d.rms)
        raise VerificationError(
            f"golden vectors do not hold: output {worst.output!r} deviates by {worst.max_abs:.4g} "
            f"(rms {worst.rms:.4g}), allowed are {worst.tolerance.max_abs:.4g} (rms {worst.tolerance.rms:.4g})",
            where=where,
            remedy="The file is damaged or this runtime computes it differently",
        )


def save(golden: Golden, path: Path) -> None:
    """Write golden vectors to ``path``."""
    arrays: dict[str, Array] = {}
    for name, value in golden.inputs.items():
        if name in golden.coded:
            arrays[f"in/{name}"] = golden.coded[name].codes
            arrays[f"code/{name}"] = np.frombuffer(golden.coded[name].how(), np.uint8)
        else:
            arrays[f"in/{name}"] = value
    arrays |= {f"own/{name}": np.asarray(shapes, np.int64) for name, shapes in golden.own.items()}
    arrays |= {f"out/{name}": value for name, value in golden.outputs.items()}
    arrays |= {f"shape/{name}": np.array(shape, np.int64) for name, shape in golden.shapes.items()}
    for name, allowed in golden.tolerances.items():
        arrays[f"tol/{name}"] = np.array([allowed.max_abs, allowed.rms], dtype=np.float64)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as member:
                np.lib.format.write_array(member, np.ascontiguousarray(value), allow_pickle=False)
    path.write_bytes(buffer.getvalue())


def load(path: Path) -> Golden:
    """Read golden vectors.

    Raises:
        BundleError: the file does not hold golden vectors, or its parts do not match.
    """
    parts: dict[str, dict[str, Array]] = {"in": {}, "out": {}, "tol": {}, "code": {}, "shape": {}, "own": {}}
    try:
        with path.open("rb") as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as archive:
            for key in archive.files:
                kind, _, name = key.partition("/")
                if kind in parts and name:
                    value = archive[key]
                    if not isinstance(value, np.ndarray):
                        raise ValueError(f"{key!r} is no array")
                    parts[kind][name] = value
        coded = {name: CodedInput.of(parts["in"][name], how.tobytes()) for name, how in parts["code"].items()}
        inputs = {**parts["in"], **{name: one.decoded() for name, one in coded.items()}}
    except UNREADABLE as error:
        raise BundleError(f"cannot be read as golden vectors: {error}", where=str(path)) from error
    outputs, tolerances = parts["out"], parts["tol"]
    shapes = {name: tuple(map(int, shape)) for name, shape in parts["shape"].items() if shape.ndim == 1}
    sketched = all(name in outputs and outputs[name].ndim == 2 for name in shapes)
    pairs = all(t.shape == (2,) and t.dtype.kind == "f" for t in tolerances.values())
    lengths = {a.shape[0] if a.ndim else -1 for a in (*inputs.values(), *outputs.values())}
    together = sketched and len(lengths) == 1 and not lengths & {-1, 0} and set(tolerances) == set(outputs)
    fits = all(name in inputs and _within(shapes, inputs[name]) for name, shapes in parts["own"].items())
    if not inputs or not outputs or not together or not pairs or not fits:
        raise BundleError("the golden vectors' parts do not belong together", where=str(path))
    allowed = {name: Tolerance(float(t[0]), float(t[1])) for name, t in tolerances.items()}
    return Golden(inputs, outputs, allowed, coded, shapes, parts["own"])


def _within(shapes: Array, array: Array) -> bool:
    """Return whether these are shapes of an array's samples."""
    fits = shapes.dtype.kind == "i" and shapes.shape == (len(array), array.ndim - 1)
    return bool(fits and (shapes >= 0).all() and (shapes <= array.shape[1:]).all())
