"""Reads tables and lines: sounds or pictures with a CSV of their labels, and texts from a CSV, JSON lines or plain
lines."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kedge.importing.data_folders.listing import (
    PICTURE_ENDINGS,
    SOUND_ENDINGS,
    Item,
    Listing,
    Truth,
    encoding_of,
    endings,
    file_at,
    lines_in,
    numbered,
)
from kedge_protocol.errors import DatasetError

FILE_COLUMNS = ("file", "filename", "file_name", "path", "filepath", "wav", "audio", "image", "fname", "name")
TEXT_COLUMNS = ("text", "sentence", "content", "review", "utterance", "query", "input")
LABEL_COLUMNS = (
    "label", "labels", "class", "category", "target", "classname", "class_name", "class_id", "intent", "sentiment",
)  # fmt: skip
TABLES = (".csv", ".tsv")
LINES = (".txt", ".jsonl", ".ndjson")
_USUAL = ("audio", "wav", "wavs", "clips", "images", "data")
_ITEMS = {**dict.fromkeys(PICTURE_ENDINGS, Item.PICTURE), **dict.fromkeys(SOUND_ENDINGS, Item.SOUND)}


def read(file: Path, *, where: str) -> Listing:
    """List a table with a header (``.csv``, ``.tsv``: a column of files or texts, and one of labels), JSON lines
    (strings, or objects with ``text`` and ``label``), or a ``.txt`` file with one text per line.

    Raises:
        DatasetError: the file does not have that format; the message names file and line.
    """
    suffix = file.suffix.lower()
    if suffix in TABLES:
        return _table(file, where)
    return _json_lines(file, where) if suffix in (".jsonl", ".ndjson") else _lines(file, where)


def _table(file: Path, where: str) -> Listing:
    table = list(rows(file, where))
    header, records = table[0][1], table[1:]
    names = [name.strip().lower() for name in header]
    label = next((names.index(name) for name in (*LABEL_COLUMNS, "y") if name in names), None)
    text = next((names.index(name) for name in TEXT_COLUMNS if name in names), None)
    source = next((names.index(name) for name in FILE_COLUMNS if name in names), None)
    if source is None and records:
        source = file_column(header, records[0][1])
    column = source if source is not None else text
    if any(Path(name).suffix in _ITEMS for name in names):
        raise DatasetError(
            f"{file.name} has no header, its first line is {', '.join(header)}",
            where=where,
            remedy=f"Write a line {FILE_COLUMNS[0]},{LABEL_COLUMNS[0]} above it",
        )
    if column is None:
        raise DatasetError(
            f"{file.name} has no column of files or of texts, it has {', '.join(header)}",
            where=where,
            remedy=f"Name a column {FILE_COLUMNS[0]} or {TEXT_COLUMNS[0]}, and one {LABEL_COLUMNS[0]}",
        )
    if not records:
        raise DatasetError(f"{file.name} has no line below its header", where=where)
    for number, row in records:
        if len(row) != len(header):
            raise DatasetError(f"{file.name}, line {number}: {len(row)} columns instead of {len(header)}", where=where)
        if label is not None and not row[label].strip():
            raise DatasetError(f"{file.name}, line {number}: the label is empty", where=where)
    labels, classes = ([], ()) if label is None else numbered([row[label].strip() for _, row in records], where=where)
    truth = Truth.NOTHING if label is None else Truth.CLASS
    if source is None:
        texts = [row[column] for _, row in records]
        return Listing(where=where, kind="texts of a table", item=Item.TEXT, truth=truth, sources=texts, labels=labels,
                       classes=classes)  # fmt: skip
    places = _places(file)
    found = [_found(file, row[column].strip(), number, places, where) for number, row in records]
    item = _ITEMS[found[0].suffix.lower()]
    other = next((one for one in found if _ITEMS[one.suffix.lower()] is not item), None)
    if other is not None:
        raise DatasetError(f"{file.name} names {item.value}, and {other.name}", where=where)
    return Listing(where=where, kind=f"{item.value} with a table", item=item, truth=truth, sources=found,
                   labels=labels, classes=classes)  # fmt: skip


def file_column(header: Sequence[str], first: Sequence[str]) -> int | None:
    """Return the column whose first cell is a file of pictures or sounds: one with a usual name before others."""
    named = [at for at, cell in enumerate(first[: len(header)]) if Path(cell.strip()).suffix.lower() in _ITEMS]
    usual = [at for at in named if header[at].strip().lower() in FILE_COLUMNS]
    return next(iter(usual or named), None)


def _places(table: Path) -> list[Path]:
    """Where a table's files may lie: beside it, in folders beside it (first one of its own name, as ``val`` of
    ``val.csv``), or in a usual folder beside its own."""
    folders = [one for one in table.parent.iterdir() if one.is_dir()]
    near = sorted(folders, key=lambda one: (one.name.lower() != table.stem.lower(), one.name))
    return [table.parent, *near, *(table.parent.parent / name for name in _USUAL), Path()]


def _found(table: Path, name: str, number: int, places: Sequence[Path], where: str) -> Path:
    known = (*SOUND_ENDINGS, *PICTURE_ENDINGS)
    forms = (
        [name]
        if Path(name).suffix.lower() in _ITEMS
        else [name + case(one) for case in (str, str.upper) for one in known]
    )
    for form in forms:
        for place in places:
            if (found := file_at(place, form)) is not None:
                return found
    raise DatasetError(f"{table.name}, line {number}: {name!r} is not there", where=where)


def rows(file: Path, where: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the non-empty rows of a table, each with the number of its last line."""
    any_row = False
    try:
        with file.open(encoding=encoding_of(file), newline="") as opened:
            head = opened.readline()
            opened.seek(0)
            kind = "\t" if file.suffix.lower() == ".tsv" else next((c for c in ",;\t|" if c in head), ",")
            reader = csv.reader(opened, delimiter=kind, strict=True)
            for row in reader:
                if any(cell.strip() for cell in row):
                    any_row = True
                    yield reader.line_num, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(
            f"{file.name} cannot be read as a table: {error}", where=where, remedy=_remedy(error)
        ) from error
    if not any_row:
        raise DatasetError(f"{file.name} is empty", where=where)


def _json_lines(file: Path, where: str) -> Listing:
    texts: list[str] = []
    labels: list[str] = []
    for number, line in enumerate(_text(file, where), start=1):
        if not line.strip():
            continue
        text, label = _json_line(line, f"{where}: {file.name}, line {number}")
        texts.append(text)
        labels += [] if label is None else [str(label)]
        if len(labels) not in (0, len(texts)):
            raise DatasetError(f"{file.name}, line {number}: some lines have a label, others have none", where=where)
    found, classes = numbered(labels, where=where) if labels else ([], ())
    return Listing(where=where, kind="texts of JSON lines", item=Item.TEXT, sources=texts, labels=found,
                   truth=Truth.CLASS if labels else Truth.NOTHING, classes=classes)  # fmt: skip


def _json_line(line: str, where: str) -> tuple[str, Any]:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"no JSON: {error}", where=where) from error
    if isinstance(content, str):
        return content, None
    if isinstance(content, dict):
        text = next((content[name] for name in TEXT_COLUMNS if isinstance(content.get(name), str)), None)
        label = next((content[name] for name in LABEL_COLUMNS if name in content), None)
        if text is not None and isinstance(label, (str, int, type(None))):
            return text, label
    raise DatasetError('a string, or an object with "text" and perhaps "label", was expected', where=where)


def _lines(file: Path, where: str) -> Listing:
    return Listing(
        where=where,
        kind="lines of text",
        item=Item.TEXT,
        truth=Truth.NOTHING,
        sources=[line for line in _text(file, where) if line.strip()],
    )


def _text(file: Path, where: str) -> list[str]:
    try:
        return lines_in(file.read_text(encoding=encoding_of(file)))
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(
            f"{file.name} cannot be read as text: {error}", where=where, remedy=_remedy(error)
        ) from error


def _remedy(error: Exception) -> str | None:
    return "Save it as UTF-8" if isinstance(error, UnicodeDecodeError) else None


def table_in(folder: Path, role: str) -> Path | None:
    """Return a folder's table or file of lines: the one named after the role (``train.csv``), or the only one."""
    found = endings(folder, (*TABLES, *LINES[1:])) or endings(folder, LINES[:1])
    return _named(found, role) or (found[0] if len(found) == 1 else None)


def table_of(folder: Path, role: str) -> Path | None:
    """Return a folder's table that is named after the role."""
    return _named(endings(folder, TABLES), role)


def _named(files: Sequence[Path], role: str) -> Path | None:
    names = {"calibration": ("train",), "evaluation": ("val", "valid", "validation", "eval", "test")}[role]
    return next((one for name in names for one in files if one.stem.lower() == name), None)
