"""Data sets: an ``.npz`` file, a folder of ``.npy`` files if the data does not fit in memory, a table of columns.

One array for each model input, by its name (or ``input`` where there is one), first axis samples, and ``label`` where
there are labels. Samples of unlike length lie in a folder of the input's name, one ``.npy`` each, or in an array that
is filled up, with ``NAME.lengths`` beside it. Nothing is loaded whole: the members of an ``.npz`` are unpacked to
``.npy`` files, which are mapped.
"""

from __future__ import annotations

import errno
import hashlib
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge.evaluation import sample_axes, unlike_arrays
from kedge.evaluation.npy_files import open_array
from kedge.evaluation.unlike_lengths import UnlikeSamples
from kedge.importing.data_folders import columns as table_columns
from kedge.importing.data_folders.columns import Columns
from kedge_protocol import digest
from kedge_protocol.bundle.config import TEXT
from kedge_protocol.errors import DatasetError, StorageError
from kedge_protocol.npz import UNREADABLE
from kedge_targets.graph.signature import TensorInfo

Array = npt.NDArray[Any]

LABEL = "label"
SOLE_INPUT = "input"
"""Name that the array may have if the model has one input, whatever the model calls that input."""
CHUNK_BYTES = 8 << 20
_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


@dataclass(frozen=True, kw_only=True)
class Data:
    """A checked data set in the form that is sent to the worker.

    Attributes:
        arrays: the model's input name → an ``.npy`` file.
        shapes: of an input whose samples differ in length, the file of their shapes: :class:`UnlikeSamples`.
        label: an ``.npy`` file.
        samples: length of the first axis.
        steps: of a model with states that the user's files leave out, how many samples in a row share one: the state
            begins anew with every ``steps``-th. None: each sample is by itself.
    """

    arrays: dict[str, str]
    samples: int
    shapes: dict[str, str] = field(default_factory=dict)
    label: str | None = None
    steps: int | None = None


class Dataset:
    """A data set as the user gave it: its files are open but not yet checked against a model.

    Args:
        path: the ``.npz`` or the folder.
        scratch: an empty folder for what is unpacked.
        role: ``calibration`` or ``evaluation``, for messages.
        annotations: a file or folder of labels (:mod:`kedge.evaluation.labels`), where the data set has none.
        files: array name → ``.npy`` file, where something else than arrays lies at ``path`` and was converted.
        columns: a table that lies at ``path``.

    Raises:
        DatasetError: nothing there, not such a file, an array that is not plain numbers or without samples.
        StorageError: no space to unpack.
    """

    def __init__(
        self,
        path: Path,
        scratch: Path,
        *,
        role: str,
        annotations: Path | None = None,
        files: Mapping[str, Path] | None = None,
        columns: Columns | None = None,
    ) -> None:
        self.path, self.role = path, role
        self.where = f"{role} {path}"
        self._columns = columns
        if columns is not None:
            self.files = table_columns.write(columns, scratch)
        elif files is not None:
            self.files = dict(files)
        else:
            self.files = _unpacked(path, scratch, self.where) if path.is_file() else _folder(path, self.where)
        if not self.files:
            raise DatasetError("holds no array", where=self.where, remedy="One array for each model input is needed")
        self.unlike = unlike_arrays.taken(self.files, scratch, where=self.where)
        self.arrays = {name: open_array(file, name=name, where=self.where) for name, file in self.files.items()}
        for name, array in self.arrays.items():
            if array.size == 0:
                raise DatasetError(f"array {name!r} has no samples", where=self.where)
        self._scratch = scratch
        self.samples = _likely_length({**self.arrays, **self.unlike})
        if annotations is not None:
            self._annotate(annotations, scratch)

    def _annotate(self, annotations: Path, scratch: Path) -> None:
        from kedge.evaluation import labels

        if LABEL in self.arrays:
            raise DatasetError(
                f"holds {LABEL!r}, and annotations are given too", where=self.where, remedy="Give one of the two"
            )
        self.files[LABEL] = scratch / "annotations.npy"
        np.save(self.files[LABEL], labels.read(annotations, self.samples))
        self.arrays[LABEL] = open_array(self.files[LABEL], name=LABEL, where=self.where)

    def bind(self, inputs: Sequence[TensorInfo], states: Mapping[str, str] | None = None) -> Data:
        """Check the arrays against a model's inputs.

        Args:
            inputs: of the graph with its batch first.
            states: input → output; where the data set has none of these inputs, samples are the steps of sequences,
                ``[steps, …]`` of one or ``[sequences, steps, …]``.

        Raises:
            DatasetError: an array of a wrong name, rank, shape or dtype, or arrays of different lengths; the message
                says what the model takes.
            StorageError: no space for an array whose samples are not along its first axis.
        """
        carried = bool(states) and not set(states or ()) & set(self.arrays)
        specs = [spec for spec in inputs if not carried or spec.name not in (states or ())]
        if self._columns is not None:
            self._fit(self._columns, specs)
        names = self._names(specs)
        for spec in specs:
            self._check(names[spec.name], self._given(names[spec.name]), spec)
        by_array = {names[spec.name]: spec for spec in specs if names[spec.name] not in self.unlike}
        apart = {names[spec.name]: spec for spec in specs if names[spec.name] in self.unlike}
        unlike_arrays.check(self.unlike, apart, where=self.where, in_steps=carried)
        made, self.samples = sample_axes.arranged(
            {array: self.arrays[array] for array in by_array},
            by_array,
            where=self.where,
            in_steps=carried,
            known={array: len(self.unlike[array]) for array in apart},
        )
        label = self.files.get(LABEL) if LABEL not in names.values() else None
        if label is not None:
            label = self._labels(label)
        self.names = {array: spec.name for array, spec in (by_array | apart).items()}
        stored = {spec.name: str(self._stored(array, made[array])) for array, spec in by_array.items()}
        return Data(
            arrays={**stored, **{spec.name: str(self.unlike[array].path) for array, spec in apart.items()}},
            shapes={spec.name: str(self.unlike[array].shapes_path) for array, spec in apart.items()},
            label=None if label is None else str(label),
            samples=self.samples,
            steps=self._steps(by_array) if carried else None,
        )

    def _fit(self, columns: Columns, specs: Sequence[TensorInfo]) -> None:
        """Let the table's arrays be the model's inputs."""
        made = columns.fitted(specs, where=self.where)
        label = {LABEL: self.files[LABEL]} if LABEL in self.files else {}
        self.files = {name: self._scratch / f"fitted-{number}.npy" for number, name in enumerate(made)} | label
        for name, array in made.items():
            np.save(self.files[name], array, allow_pickle=False)
        self.arrays = {name: open_array(file, name=name, where=self.where) for name, file in self.files.items()}

    def _given(self, name: str) -> Array | UnlikeSamples:
        return self.unlike[name] if name in self.unlike else self.arrays[name]

    def _steps(self, specs: Mapping[str, TensorInfo]) -> int:
        """Return the length of each sequence, or of the only one."""
        for name, spec in specs.items():
            if spec.batched and self.arrays[name].ndim == len(spec.shape) + 1:
                return int(self.arrays[name].shape[1])
        return self.samples

    def _labels(self, path: Path) -> Path:
        """Return the file of labels, one per sample."""
        labels = self.arrays[LABEL]
        if len(labels.shape) > 0 and labels.shape[0] == self.samples:
            return path
        if labels.ndim > 1 and labels.shape[0] * labels.shape[1] == self.samples:
            return self._stored(LABEL, labels.reshape(self.samples, *labels.shape[2:]))
        lengths = dict.fromkeys(self.arrays, self.samples) | {LABEL: len(labels) if labels.ndim else 1}
        listed = ", ".join(f"{name} {length}" for name, length in sorted(lengths.items()))
        raise DatasetError(f"the arrays have different numbers of samples: {listed}", where=self.where)

    def _stored(self, name: str, array: Array) -> Path:
        """Return the array's own file if its first axis is the sample, else a copy."""
        own = self.arrays[name]
        if own.shape == array.shape and own.strides == array.strides:
            return self.files[name]
        path = self._scratch / f"samples-{len(list(self._scratch.glob('samples-*')))}.npy"
        try:
            np.save(path, array)
        except OSError as error:
            raise StorageError(f"no space to arrange array {name!r}: {error.strerror}", where=self.where) from error
        return path

    def _names(self, inputs: Sequence[TensorInfo]) -> dict[str, str]:
        names = {spec.name: spec.name for spec in inputs}
        if len(inputs) == 1 and inputs[0].name not in self.arrays and SOLE_INPUT in (*self.arrays, *self.unlike):
            names = {inputs[0].name: SOLE_INPUT}
        there = [*self.arrays, *self.unlike]
        missing = [name for name, array in names.items() if array not in there]
        unknown = [array for array in there if array not in names.values() and array != LABEL]
        if missing or unknown:
            problems = [f"no array for input {name!r}" for name in missing]
            problems += [f"array {array!r} is no input of the model" for array in unknown]
            takes = ", ".join(spec.name for spec in inputs)
            sole = f" (or {SOLE_INPUT!r})" if len(inputs) == 1 else ""
            raise DatasetError(
                "; ".join(problems), where=self.where, remedy=f"The model takes {takes}{sole}; labels go by {LABEL!r}"
            )
        return names

    def _check(self, name: str, array: Array | UnlikeSamples, spec: TensorInfo) -> None:
        if spec.dtype == TEXT:
            if array.dtype.kind != "U":
                raise DatasetError(
                    f"array {name!r} has dtype {array.dtype}, the model's input takes texts",
                    where=self.where,
                    remedy="Store it as texts: array.astype(str)",
                )
            return
        if array.dtype.kind not in "fiub":
            raise DatasetError(f"array {name!r} has dtype {array.dtype}, which is not numeric", where=self.where)
        if np.dtype(spec.dtype).kind in "iub" and array.dtype.kind == "f":
            raise DatasetError(
                f"array {name!r} has dtype {array.dtype}, the model's input takes {spec.dtype}",
                where=self.where,
                remedy=f"Store it as {spec.dtype}",
            )

    def scan(self) -> Scan:
        """Read all data once, in chunks: find NaNs, compute the digest, and hash each sample.

        Raises:
            DatasetError: an infinite value, or NaN as a label; the message names array and sample.
        """
        content: dict[str, bytes] = {}
        missing: dict[str, int] = {}
        rows = np.zeros(self.samples, dtype=np.uint64)
        for name in sorted(self.arrays):
            array = np.atleast_1d(self.arrays[name])
            state = hashlib.sha256()
            for start, chunk in chunks(array):
                if chunk.dtype.kind == "f":
                    self._finite(name, start, chunk, missing)
                raw = np.ascontiguousarray(chunk)
                state.update(raw.data)
                if name != LABEL and len(array) == self.samples:
                    hashes = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in raw]
                    part = rows[start : start + len(raw)]
                    part *= np.uint64(0x9E3779B97F4A7C15)
                    part ^= np.frombuffer(b"".join(hashes), dtype=np.uint64)
            content[name] = f"{array.dtype.str} {array.shape} {state.hexdigest()}".encode()
        for name, samples in sorted(self.unlike.items()):
            state = hashlib.sha256(samples.shapes.tobytes())
            for row in range(len(samples)):
                sample = samples.sample(row)
                if sample.dtype.kind == "f":
                    self._finite(name, row, sample[np.newaxis], missing)
                raw = np.ascontiguousarray(sample)
                state.update(raw.data)
                found = hashlib.blake2b(raw.data, digest_size=8).digest()
                if len(samples) == self.samples:
                    part = rows[row : row + 1]
                    part *= np.uint64(0x9E3779B97F4A7C15)
                    part ^= np.frombuffer(found, np.uint64)
            content[name] = f"{samples.dtype.str} {len(samples)} samples {state.hexdigest()}".encode()
        return Scan(content, rows, missing)

    def _finite(self, name: str, start: int, chunk: Array, missing: dict[str, int]) -> None:
        finite = np.isfinite(chunk)
        if finite.all():
            return
        first = start + int(np.argmin(finite.reshape(len(chunk), -1).all(axis=1)))
        if name == LABEL or np.isinf(chunk).any():
            raise DatasetError(
                f"array {name!r} holds NaN or infinite values, first in sample {first}",
                where=self.where,
                remedy="Remove or correct these samples",
            )
        missing.setdefault(name, first)

    def check_missing(self, scan: Scan, *, taken: bool) -> None:
        """Check that NaN stands only where the model takes it as a missing value.

        Raises:
            DatasetError: it does not; the message names array and sample.
        """
        if scan.missing and not taken:
            name, first = next(iter(scan.missing.items()))
            raise DatasetError(
                f"array {name!r} has no value (NaN) in sample {first}, and the model takes none for missing",
                where=self.where,
                remedy="Remove or correct these samples; a model of scikit-learn takes them with an imputer, or by "
                "trees that were fitted with them",
            )


@dataclass(frozen=True)
class Scan:
    """Result of reading a data set once.

    Attributes:
        content: a digest of each array.
        rows: a hash of each sample.
        missing: array name → the first sample with NaN in it.
    """

    content: dict[str, bytes]
    rows: npt.NDArray[np.uint64]
    missing: dict[str, int] = field(default_factory=dict)

    def digest(self, names: dict[str, str]) -> str:
        """Return a digest of the arrays by the model's input names; an ``.npz`` file and a folder give the same.

        Args:
            names: array name → input name.
        """
        contents = sorted((names.get(array, array), content) for array, content in self.content.items())
        return digest.of_chunks(name.encode() + b"\0" + content + b"\n" for name, content in contents)

    def shared_with(self, other: Scan) -> int:
        """Return how many samples of ``other`` are also in this data set."""
        return int(np.isin(other.rows, self.rows).sum())


def chunks(array: Array) -> Iterator[tuple[int, Array]]:
    """Yield ``(index of the first sample, samples)`` in chunks of about :data:`CHUNK_BYTES`."""
    step = max(1, CHUNK_BYTES // max(1, array[:1].nbytes))
    for start in range(0, array.shape[0], step):
        yield start, array[start : start + step]


def _folder(path: Path, where: str) -> dict[str, Path]:
    if not path.is_dir():
        raise DatasetError("is neither a file nor a folder", where=where)
    inner = {folder.name: folder for folder in sorted(path.iterdir()) if any(folder.glob("*.npy"))}
    return {**{file.stem: file for file in sorted(path.glob("*.npy"))}, **inner}


def _unpacked(path: Path, scratch: Path, where: str) -> dict[str, Path]:
    files: dict[str, Path] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
            for number, info in enumerate(members):
                target = scratch / f"{number}.npy"
                with archive.open(info) as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink, CHUNK_BYTES)
                files[info.filename[: -len(".npy")]] = target
    except OSError as error:
        if error.errno in _FULL:
            raise StorageError(
                f"no space to unpack it: {error.strerror}", where=where, remedy="Free space where OUT will be"
            ) from error
        raise DatasetError(f"cannot be read: {error}", where=where) from error
    except UNREADABLE as error:
        raise DatasetError(
            f"is no .npz: {error}", where=where, remedy="Write it with numpy.savez, or give a folder of .npy files"
        ) from error
    return files


def _likely_length(arrays: Mapping[str, Array | UnlikeSamples]) -> int:
    """Estimate the number of samples before the model's axes are known: the first axis that most arrays share; in a
    tie, that of the larger arrays."""
    votes: dict[int, tuple[int, int]] = {}
    for array in arrays.values():
        length = array.shape[0] if array.shape else 1
        count, size = votes.get(length, (0, 0))
        votes[length] = (count + 1, size + array.nbytes)
    return max(votes, key=lambda length: votes[length])
