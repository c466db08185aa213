"""Reads the user's texts as sequences of tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kedge.importing.data_folders import listing
from kedge_protocol import digest
from kedge_protocol.errors import DatasetError, MissingDependencyError
from kedge_protocol.packages import pip_install
from kedge_targets.decoder import tokenizing

SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
_KEYS = ("text", "content")
_PIECE = 1 << 16
"""Characters that are tokenized in one call."""


def tokenizer(raw: bytes, *, where: str) -> Any:
    """Return the tokenizer of a ``tokenizer.json``.

    Raises:
        MissingDependencyError: the ``generation`` extra is not installed.
        DatasetError: the library refuses the file.
    """
    try:
        return tokenizing.opened(raw)
    except ImportError as error:
        raise MissingDependencyError(
            f"tokenizers cannot be loaded: {error}", remedy=f"Install it with {pip_install('generation')}"
        ) from error
    except Exception as error:  # the library raises Exception itself
        raise DatasetError(
            f"the tokenizer is refused: {error}", where=where, remedy="Fetch the folder again"
        ) from error


def files(path: Path, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """Return the text files of a path: the file itself, or those in the folder.

    Raises:
        DatasetError: there are none.
    """
    if path.is_file() and path.suffix.lower() in suffixes:
        return [path]
    found = listing.endings(path, suffixes, deep=True) if path.is_dir() else []
    if not found:
        what = "holds no text" if path.exists() else "there is no such file or folder"
        raise DatasetError(what, where=str(path), remedy=f"Give files of {', '.join(suffixes)}")
    return found


def read(path: Path) -> tuple[list[str], str]:
    """Return all texts of a path (one per file, line or row) and their digest.

    Raises:
        DatasetError: there is no text, or a file cannot be read.
        MissingDependencyError: a file is parquet, and pyarrow is not installed.
    """
    found = [text for file in files(path) for text in of_file(file) if text.strip()]
    if not found:
        raise DatasetError("all texts are empty", where=str(path), remedy="Give some thousand words")
    return found, digest.of_bytes("\0".join(found).encode("utf-8", "surrogatepass"))


def of_file(file: Path) -> Iterator[str]:
    """Yield the texts of one file.

    Raises:
        DatasetError: the file cannot be read.
        MissingDependencyError: it is parquet, and pyarrow is not installed.
    """
    if file.suffix.lower() == ".parquet":
        yield from _rows(file)
    elif file.suffix.lower() == ".jsonl":
        for number, line in numbered_lines(file):
            yield _of_line(line, f"{file}:{number}")
    else:
        yield whole(file)


def whole(file: Path) -> str:
    """Return a text file's content.

    Raises:
        DatasetError: the file cannot be read.
    """
    try:
        return file.read_text(encoding=listing.encoding_of(file))
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"cannot be read as UTF-8: {error}", where=str(file), remedy="Save it as UTF-8") from error


def numbered_lines(file: Path) -> list[tuple[int, str]]:
    """Return a text file's lines that are not empty, with their numbers from 1 on; see :func:`whole`."""
    return [(number, line) for number, line in enumerate(listing.lines_in(whole(file)), 1) if line.strip()]


def parsed(line: str, where: str, *, remedy: str) -> Any:
    """Return a line of JSON.

    Raises:
        DatasetError: it is none, or a text in it has half a character.
    """
    try:
        value = json.loads(line)
        if "\\u" in line:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DatasetError("holds half a character (a lone surrogate)", where=where, remedy="Leave it out") from error
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"is no JSON: {error}", where=where, remedy=remedy) from error
    return value


def _of_line(line: str, where: str) -> str:
    remedy = f"Write a text, or an object with the key {_KEYS[0]!r}"
    value = parsed(line, where, remedy=remedy)
    if isinstance(value, dict):
        value = next((value[key] for key in _KEYS if key in value), None)
    if not isinstance(value, str):
        raise DatasetError("holds no text", where=where, remedy=remedy)
    return value


def _rows(file: Path) -> Iterator[str]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise MissingDependencyError(
            "reading parquet needs pyarrow",
            where=str(file),
            remedy=f"Install it with {pip_install('parquet')}, or give .txt or .jsonl",
        ) from error
    try:
        opened = parquet.ParquetFile(file)
        names = opened.schema_arrow.names
        name = next((key for key in _KEYS if key in names), None)
        if name is None:
            raise DatasetError(
                f"has no column {_KEYS[0]!r}, it has {', '.join(names)}",
                where=str(file),
                remedy=f"Rename the column of texts to {_KEYS[0]!r}",
            )
        for batch in opened.iter_batches(columns=[name]):
            yield from (str(value) for value in batch.column(0).to_pylist() if value is not None)
    except (OSError, ValueError) as error:  # pyarrow's errors are of these
        raise DatasetError(f"cannot be read: {error}", where=str(file)) from error


def sequences(
    texts: list[str], tokens: Any, *, length: int, wanted: int, begin: int | None, where: str
) -> list[list[int]]:
    """Return sequences of ``length`` tokens, spread evenly over all texts; each begins with ``begin`` unless it is
    None.

    Raises:
        DatasetError: the texts are shorter than one sequence of eight tokens.
    """
    stream: list[int] = []
    most = 64 * wanted * length
    for text in texts:
        for at in range(0, len(text), _PIECE):
            stream += tokens.encode(text[at : at + _PIECE], add_special_tokens=False).ids
        if len(stream) > most:
            break
    own = length - (begin is not None)
    if len(stream) < 8:
        raise DatasetError(f"holds {len(stream)} tokens", where=where, remedy="Give some thousand words")
    count = max(1, min(wanted, len(stream) // own))
    last = max(0, len(stream) - own)
    starts = [round(last * at / max(1, count - 1)) for at in range(count)]
    head = [] if begin is None else [begin]
    return [head + stream[start : start + own] for start in starts]
