"""Tables whose columns are the model's own inputs: a CSV of numbers and texts, as scikit-learn's users have them; also
lines of text, for a model that takes texts itself."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge.importing.data_folders import tables
from kedge_protocol.bundle.config import TEXT
from kedge_protocol.errors import DatasetError
from kedge_targets.graph.signature import TensorInfo

Array = npt.NDArray[Any]

LABEL = "label"
_MISSING = frozenset({"", "na", "n/a", "#n/a", "<na>", "nan", "null", "none"})
"""What pandas reads as a missing value."""
_UNNAMED = ("", "unnamed: 0")
_WHOLE = re.compile(r"[+-]?\d{1,18}")


@dataclass(frozen=True)
class Columns:
    """A table in memory.

    Attributes:
        cells: column → its cells as they are written, without the labels; in the file's order.
        labels: class numbers, class names, or values; None if there are none.
        lines: of each row, in the file.
        file: the table's name, for messages.
    """

    cells: dict[str, list[str]]
    labels: Array | None
    lines: Sequence[int]
    file: str

    def arrays(self) -> dict[str, Array]:
        """Return column → [N]: int64, float64 or texts, whichever its cells are; and the labels."""
        made = {name: _likeliest(cells) for name, cells in self.cells.items()}
        return made if self.labels is None else {**made, LABEL: self.labels}

    def fitted(self, inputs: Sequence[TensorInfo], *, where: str) -> dict[str, Array]:
        """Return the model's inputs: a column each, by name; or all columns in their order, where one input takes them
        together.

        Args:
            inputs: with the batch first.
            where: the data set's name in messages.

        Raises:
            DatasetError: a column is missing, or a cell is no number where the model takes numbers.
        """
        if all(spec.name in self.cells for spec in inputs):
            return {spec.name: self._column(spec.name, spec, where).reshape(-1, *_ones(spec)) for spec in inputs}
        if len(inputs) == 1:
            (spec,) = inputs
            wide = len(spec.shape) == 2 and spec.shape[1] in (None, len(self.cells))
            if wide:
                parts = [self._column(name, spec, where) for name in self.cells]
                return {spec.name: np.stack(parts, axis=1)}
            if len(self.cells) == 1:
                return {spec.name: self._column(next(iter(self.cells)), spec, where).reshape(-1, *_ones(spec))}
        takes = ", ".join(
            f"{spec.name} {'x'.join('?' if a is None else str(a) for a in spec.shape)}" for spec in inputs
        )
        raise DatasetError(
            f"the columns {', '.join(self.cells)} are not what the model takes: {takes}",
            where=where,
            remedy="Name a column for each input, or give as many columns as the only input has; files and texts "
            "that become tensors need --task or --pipeline",
        )

    def _column(self, name: str, spec: TensorInfo, where: str) -> Array:
        cells = self.cells[name]
        if spec.dtype == TEXT:
            return np.array(cells, dtype=TEXT)
        whole = np.dtype(spec.dtype).kind in "iub"
        for cell, line in zip(cells, self.lines, strict=True):
            if not (_WHOLE.fullmatch(cell.strip()) if whole else _is_number(cell) or _is_missing(cell)):
                said = "whole number" if whole else "number"
                raise DatasetError(
                    f"{self.file}, line {line}: {cell[:40]!r} in column {name!r} is no {said}, the model takes {said}s",
                    where=where,
                    remedy="Texts that become tensors need --task or --pipeline",
                )
        return np.array([int(cell) for cell in cells], np.int64) if whole else _numbers(cells)


def is_columns(path: Path) -> bool:
    """Return whether a path holds a table, or lines of text, that does not name files."""
    suffix = path.suffix.lower()
    if not path.is_file() or suffix not in (*tables.TABLES, *tables.LINES):
        return False
    if suffix in tables.LINES:
        return True
    try:
        rows = tables.rows(path, str(path))
        header, first = next(rows)[1], next(rows, (0, []))[1]
    except DatasetError:
        return True  # what is wrong with it is said where it is read
    return tables.file_column(header, first) is None


def read(path: Path, *, where: str) -> Columns:
    """Read a table (``.csv``, ``.tsv`` with a header), or lines of text as a column ``text``.

    Raises:
        DatasetError: the file is no table, or a row is shorter or longer than the header.
    """
    if path.suffix.lower() in tables.LINES:
        listing = tables.read(path, where=where)
        texts = [str(text) for text in listing.sources]
        named = [listing.classes[one] for one in listing.labels] if listing.classes else list(listing.labels)
        lines = range(1, len(texts) + 1)
        return Columns({"text": texts}, np.array(named) if named else None, lines, path.name)
    found = list(tables.rows(path, where))
    header, records = [name.strip() for name in found[0][1]], found[1:]
    if not records:
        raise DatasetError(f"{path.name} has no line below its header", where=where)
    if all(map(_is_number, header)):
        raise DatasetError(
            f"{path.name} has no header, its first line is {', '.join(header)}",
            where=where,
            remedy=f"Write a line with the columns' names above it, the labels' {LABEL}",
        )
    if len(set(header)) != len(header):
        double = next(name for name in header if header.count(name) > 1)
        raise DatasetError(f"{path.name} has two columns {double!r}", where=where)
    for line, row in records:
        if len(row) != len(header):
            raise DatasetError(f"{path.name}, line {line}: {len(row)} columns instead of {len(header)}", where=where)
    label = _label(header)
    cells = {name: [row[at] for _, row in records] for at, name in enumerate(header) if at != label}
    if _is_index(header[0], cells.get(header[0], [])):
        del cells[header[0]]
    empty = None if label is None else next((line for line, row in records if not row[label].strip()), None)
    if empty is not None:
        raise DatasetError(f"{path.name}, line {empty}: the label is empty", where=where)
    labels = None if label is None else _likeliest([row[label].strip() for _, row in records])
    if not cells:
        raise DatasetError(f"{path.name} has no column beside the labels", where=where)
    return Columns(cells, labels, [line for line, _ in records], path.name)


def write(columns: Columns, scratch: Path) -> dict[str, Path]:
    """Write the columns as ``.npy`` files; column (and ``label``) → file."""
    files = {}
    for number, (name, array) in enumerate(columns.arrays().items()):
        files[name] = scratch / f"column-{number}.npy"
        np.save(files[name], array, allow_pickle=False)
    return files


def _label(header: Sequence[str]) -> int | None:
    lower = [name.lower() for name in header]
    return next((lower.index(name) for name in tables.LABEL_COLUMNS if name in lower), None)


def _is_index(name: str, cells: Sequence[str]) -> bool:
    """Return whether a table's first column is the row numbers that pandas writes in front, which have no name."""
    unnamed = name.lower() in _UNNAMED
    return unnamed and len(set(cells)) == len(cells) > 0 and all(_WHOLE.fullmatch(cell.strip()) for cell in cells)


def _likeliest(cells: Sequence[str]) -> Array:
    if all(_WHOLE.fullmatch(cell.strip()) for cell in cells):
        return np.array([int(cell) for cell in cells], np.int64)
    if all(_is_missing(cell) or _is_number(cell) for cell in cells) and not all(map(_is_missing, cells)):
        return _numbers(cells)
    return np.array(cells, dtype=TEXT)


def _numbers(cells: Sequence[str]) -> Array:
    """Return numbers in float64, NaN for what is missing."""
    return np.array([math.nan if _is_missing(cell) else float(cell) for cell in cells])


def _is_missing(cell: str) -> bool:
    return cell.strip().lower() in _MISSING


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _ones(spec: TensorInfo) -> tuple[int, ...]:
    return (1,) * (len(spec.shape) - 1)
