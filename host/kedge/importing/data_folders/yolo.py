"""Reads YOLO: pictures in ``images/``, one text file of boxes per picture in ``labels/``, and a ``data.yaml`` that
names folders and classes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from kedge.importing.data_folders.listing import PICTURE_ENDINGS, Item, Listing, Truth, encoding_of, endings, file_at
from kedge_protocol.errors import DatasetError, MissingDependencyError
from kedge_protocol.packages import pip_install

_BOX = 5
_SPLITS = {"calibration": ("train",), "evaluation": ("val", "valid", "test")}
_EDGE = 1e-3
"""How far a number may exceed 1 because of rounding."""


def yaml_file(path: Path) -> Path | None:
    """Return the ``data.yaml`` that a path is or contains."""
    if path.is_file():
        return path if path.suffix.lower() in (".yaml", ".yml") else None
    usual = next((path / name for name in ("data.yaml", "data.yml", "dataset.yaml") if (path / name).is_file()), None)
    others = endings(path, (".yaml", ".yml"))
    return usual or (others[0] if len(others) == 1 and (path / "images").is_dir() else None)


def labels_folder(pictures: Path) -> Path | None:
    """Return the folder of a picture folder's labels: ``…/labels/…`` for ``…/images/…``, or ``labels`` in the
    folder."""
    if (pictures / "labels").is_dir():
        return pictures / "labels"
    parts = list(pictures.absolute().parts)
    for place in range(len(parts) - 1, 0, -1):
        if parts[place] == "images":
            beside = Path(*parts[:place], "labels", *parts[place + 1 :])
            return beside if beside.is_dir() else None
    return None


def read_yaml(file: Path, role: str, *, where: str) -> Listing:
    """List the pictures that a ``data.yaml`` names: ``train`` for calibration, ``val`` for evaluation.

    Raises:
        DatasetError: the file or a folder does not exist, or labels are invalid.
        MissingDependencyError: PyYAML is not installed.
    """
    content = _yaml(file, where)
    base = Path(str(content.get("path") or "."))
    roots = [file.parent / base, base, file.parent]
    split = next((name for name in _SPLITS[role] if content.get(name)), None)
    if split is None:
        raise DatasetError(
            f"{file.name} names no {' or '.join(_SPLITS[role])}",
            where=where,
            remedy=f"Add it, or give a folder of pictures for the {role}; their labels are found beside them",
        )
    named = content[split] if isinstance(content[split], list) else [content[split]]
    pictures = [one for entry in named for one in _pictures(str(entry), roots, file, where)]
    return _listed(pictures, _names(content, file, where), where)


def read_folder(folder: Path, *, where: str, labels: Path | None = None) -> Listing:
    """List a folder of pictures whose labels lie beside it; classes have no names.

    Args:
        labels: the folder of the text files, if it is not the usual one.
    """
    return _listed(endings(folder, PICTURE_ENDINGS, deep=True), (), where, labels)


def _listed(pictures: list[Path], classes: tuple[str, ...], where: str, folder: Path | None = None) -> Listing:
    files = [_label_file(one) if folder is None else folder / f"{one.stem}.txt" for one in pictures]
    labels = [rows(file, len(classes) or None, where=where) for file in files]
    if pictures and not any(labels):
        raise DatasetError(f"no picture has a label: {files[0]} and all others are missing or empty", where=where)
    return Listing(
        where=where,
        kind="pictures with YOLO labels",
        item=Item.PICTURE,
        truth=Truth.BOXES,
        sources=pictures,
        labels=labels,
        classes=classes,
    )


def _label_file(picture: Path) -> Path:
    folder = labels_folder(picture.parent)
    return (folder or picture.parent) / f"{picture.stem}.txt"


def rows(file: Path, classes: int | None, *, where: str) -> list[list[float]]:
    """Return the boxes of one text file as class, x1, y1, x2, y2, 0, in fractions of the picture; empty if the file
    does not exist. A line holds a class with centre, width and height, or a class with the corners of an outline.

    Args:
        classes: the number of classes, if known.

    Raises:
        DatasetError: a line has another form; the message names file and line.
    """
    try:
        lines = file.read_text(encoding=encoding_of(file)).splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{file} cannot be read as text: {error}", where=where) from error
    found = []
    for number, line in enumerate(lines, start=1):
        if fields := line.split():
            found.append(_row(fields, classes, f"{where}: {file}, line {number}"))
    return found


def _row(fields: list[str], classes: int | None, where: str) -> list[float]:
    try:
        kind, values = _whole(fields[0]), [float(one) for one in fields[1:]]
    except ValueError:
        kind, values = -1, []
    outline = len(fields) > _BOX and len(fields) % 2 == 1
    if kind < 0 or not all(map(math.isfinite, values)) or not (len(fields) == _BOX or outline):
        raise DatasetError("a class and four numbers (centre, width, height) were expected", where=where)
    if classes is not None and kind >= classes:
        raise DatasetError(f"class {kind} is none of {classes} (0 to {classes - 1})", where=where)
    if min(values) < -_EDGE or max(values) > 1 + _EDGE:
        raise DatasetError(
            "the box lies outside the picture", where=where, remedy="Coordinates are shares of its width and height"
        )
    if outline:
        across, down = values[0::2], values[1::2]
        corners = [min(across), min(down), max(across), max(down)]
    else:
        x, y, w, h = values
        corners = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
    # An object at the edge often has a box that reaches beyond it; Ultralytics cuts it off too.
    return [float(kind), *(min(1.0, max(0.0, corner)) for corner in corners), 0.0]


def _whole(field: str) -> int:
    """Return a class number; tools that hold labels in floats write 0.0."""
    number = float(field)
    if not number.is_integer():
        raise ValueError(field)
    return int(number)


def _yaml(file: Path, where: str) -> dict[str, Any]:
    try:
        import yaml
    except ImportError as error:
        raise MissingDependencyError(
            "a data.yaml is read by PyYAML", where=where, remedy=f"Install it: {pip_install('data')}"
        ) from error
    try:
        content = yaml.safe_load(file.read_text(encoding=encoding_of(file)))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DatasetError(f"{file.name} is no YAML: {error}", where=where) from error
    if not isinstance(content, dict):
        raise DatasetError(f"{file.name} names nothing", where=where)
    return content


def _names(content: dict[str, Any], file: Path, where: str) -> tuple[str, ...]:
    names, count = content.get("names"), content.get("nc")
    if isinstance(names, dict):
        by_number = {str(key): str(name) for key, name in names.items()}
        if by_number.keys() == {str(number) for number in range(len(names))}:
            return tuple(by_number[str(number)] for number in range(len(names)))
    if isinstance(names, list):
        return tuple(map(str, names))
    if names is None and type(count) is int and count > 0:
        return tuple(f"class_{number}" for number in range(count))  # as Ultralytics calls them
    raise DatasetError(
        f"{file.name} has no class names",
        where=where,
        remedy="Write names: [cat, dog], or names: with 0: cat, 1: dog below it",
    )


def _pictures(entry: str, roots: list[Path], file: Path, where: str) -> list[Path]:
    # Exports of Roboflow write ../train/images beside a file that lies one folder higher.
    entry = entry.replace("\\", "/")
    forms = [entry, entry.removeprefix("../")]
    place = next((root / form for form in forms for root in roots if (root / form).exists()), None)
    if place is None:
        raise DatasetError(f"{file.name} names {entry}, which is not there", where=where)
    if place.is_dir():
        return endings(place, PICTURE_ENDINGS, deep=True)
    lines = [line.strip() for line in place.read_text(encoding=encoding_of(place)).splitlines() if line.strip()]
    near = (place.parent, *roots)
    listed = [next((found for root in near if (found := file_at(root, one))), Path(one)) for one in lines]
    missing = next((one for one in listed if not one.is_file()), None)
    if missing is not None:
        raise DatasetError(f"{place.name} names {missing}, which is not there", where=where)
    return listed
