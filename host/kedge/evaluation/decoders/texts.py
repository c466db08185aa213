"""Reads the user's texts as sequences of tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kedge_protocol import digest
from kedge_protocol.errors import DatasetError, MissingDependencyError
from kedge_protocol.packages import pip_install

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
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingDependencyError(
            f"tokenizers cannot be loaded: {error}", remedy=f"Install it with {pip_install('generation')}"
        ) from error
    try:
        return Tokenizer.from_str(raw.decode())
    except Exception as error:  # the library raises Exception itself
        raise DatasetError(
            f"the tokenizer is refused: {error}", where=where, remedy="Fetch the folder again"
        ) from error


def files(path: Path, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """Return the text files of a path: the file itself, or those in the folder.

    Raises:
        DatasetError: there are none.
    """
    if path.is_file() and path.suffix in suffixes:
        return [path]
    found = sorted(one for one in path.rglob("*") if one.suffix in suffixes and one.is_file()) if path.is_dir() else []
    if not found:
        raise DatasetError("holds no text", where=str(path), remedy=f"Give files of {', '.join(suffixes)}")
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


def of_file(file: Path, *, whole: bool = False) -> Iterator[str]:
    """Yield the texts of one file; with ``whole`` its content as it is, unless it is parquet.

    Raises:
        DatasetError: the file cannot be read.
        MissingDependencyError: it is parquet, and pyarrow is not installed.
    """
    if file.suffix == ".parquet":
        yield from _rows(file)
        return
    try:
        content = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"cannot be read as UTF-8: {error}", where=str(file)) from error
    if whole or file.suffix != ".jsonl":
        yield content
        return
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            yield _of_line(line, f"{file}:{number}")


def _of_line(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise DatasetError(f"is no JSON: {error}", where=where) from error
    text = value if isinstance(value, str) else next((value[key] for key in _KEYS if key in value), None)
    if not isinstance(text, str):
        raise DatasetError("holds no text", where=where, remedy=f"Write an object with the key {_KEYS[0]!r}")
    return text


def _rows(file: Path) -> Iterator[str]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise MissingDependencyError(
            "reading parquet needs pyarrow", where=str(file), remedy="Install it, or give .txt or .jsonl"
        ) from error
    try:
        table = parquet.read_table(file)
        names = [name for name in _KEYS if name in table.column_names]
        if not names:
            raise DatasetError(f"has no column {_KEYS[0]!r}", where=str(file))
        yield from (str(value) for value in table.column(names[0]).to_pylist() if value is not None)
    except OSError as error:
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
