"""A reader's result: the location of each item and its expected answer, without reading the items themselves."""

from __future__ import annotations

import codecs
import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kedge_protocol.errors import DatasetError

PICTURE_ENDINGS = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp")
SOUND_ENDINGS = (".wav",)


class Item(str, enum.Enum):
    """The kind of the items."""

    PICTURE = "pictures"
    SOUND = "sounds"
    TEXT = "texts"


class Truth(str, enum.Enum):
    """The kind of label that is known for each item."""

    NOTHING = "nothing"
    CLASS = "class"  # a class number, or a class name
    BOXES = "boxes"  # rows of class, x1, y1, x2, y2 (shares of the picture), 1 for a crowd
    TEXT = "text"


@dataclass(frozen=True, kw_only=True)
class Listing:
    """A data set's items, in order.

    Attributes:
        where: the data set's name in messages.
        kind: the kind of the data set, in words (``pictures in class folders``).
        sources: a path or a text for each item.
        labels: the labels, as ``truth`` says; empty if nothing is known.
        classes: the class names, in the order of the class numbers; empty if there are none.
        left_out: files that lie among the items in a format that pipelines do not read.
    """

    where: str
    kind: str
    item: Item
    truth: Truth
    sources: Sequence[Path | str]
    labels: Sequence[Any] = ()
    classes: tuple[str, ...] = ()
    left_out: Sequence[Path] = ()

    def picked(self, most: int | None) -> Listing:
        """Return a listing of at most this many items, spread evenly over the list."""
        count = len(self.sources)
        if most is None or count <= most:
            return self
        places = [int((place + 0.5) * count / most) for place in range(most)]
        labels = [self.labels[place] for place in places] if self.labels else ()
        return replace(self, sources=[self.sources[place] for place in places], labels=labels)

    def under(self, names: tuple[str, ...]) -> Listing:
        """Return the same listing with the classes numbered as in the model.

        Args:
            names: the model's class names; empty if it has none.

        Raises:
            DatasetError: the data set has more classes than the model, or a class that the model lacks.
        """
        if not names or not self.classes or self.classes == names:
            return self
        unknown = [one for one in self.classes if one not in names]
        if unknown and len(self.classes) == len(names):
            return self  # other words for the same classes, in the same order
        if unknown:
            raise DatasetError(
                f"class {unknown[0]!r} is none of the model's {len(names)}",
                where=self.where,
                remedy=f"The model has {', '.join(names[:8])}{', …' if len(names) > 8 else ''}",
            )
        turned = {number: names.index(one) for number, one in enumerate(self.classes)}
        labels: list[Any] = list(self.labels)
        if self.truth is Truth.CLASS:
            labels = [turned[number] for number in labels]
        elif self.truth is Truth.BOXES:
            labels = [[[float(turned[int(kind)]), *rest] for kind, *rest in rows] for rows in labels]
        return replace(self, labels=labels, classes=names)


def numbered(values: Sequence[str], *, where: str) -> tuple[list[int], tuple[str, ...]]:
    """Return the class numbers of labels written as numbers or as names, and the names in order (empty for numbers)."""
    if all(value.lstrip("-").isdigit() for value in values):
        return [int(value) for value in values], ()
    names = tuple(sorted(set(values)))
    if len(names) == len(values) > 1:
        raise DatasetError(f"each of the {len(values)} labels is another: they are no classes", where=where)
    places = {name: number for number, name in enumerate(names)}
    return [places[value] for value in values], names


def encoding_of(file: Path) -> str:
    """Return a text file's encoding: UTF-16 if it begins with that byte order mark, as Excel and PowerShell write it,
    else UTF-8.

    Raises:
        OSError: the file cannot be read.
    """
    with file.open("rb") as opened:
        mark = opened.read(len(codecs.BOM_UTF16))
    return "utf-16" if mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def lines_in(text: str) -> list[str]:
    """Return the lines of a text. Not by ``splitlines``: a line may hold Unicode's other separators."""
    return text.removesuffix("\n").split("\n") if text else []


def file_at(place: Path, name: str) -> Path | None:
    """Return the file of this name in a folder, or None; a name written on Windows may have backslashes."""
    return next((place / form for form in (name, name.replace("\\", "/")) if (place / form).is_file()), None)


def endings(folder: Path, wanted: tuple[str, ...], *, deep: bool = False) -> list[Path]:
    """Return a folder's files with one of the wanted suffixes, sorted; hidden files are left out."""
    found = folder.rglob("*") if deep else folder.iterdir()
    return sorted(
        path for path in found if path.suffix.lower() in wanted and not path.name.startswith(".") and path.is_file()
    )
