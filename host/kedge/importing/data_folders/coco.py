"""Reads COCO: one JSON file with pictures, categories and annotations, and the pictures beside it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kedge.importing.data_folders.listing import PICTURE_ENDINGS, Item, Listing, Truth, encoding_of, file_at
from kedge_protocol.errors import DatasetError

_SPLITS = ("train2017", "val2017", "train", "valid", "val", "test")
_FOLDERS = ("", "images", *_SPLITS, *(f"images/{split}" for split in _SPLITS))


def is_coco(path: Path) -> bool:
    """Return whether a JSON file is COCO's, judged by the keys in its first bytes."""
    if path.suffix.lower() != ".json" or not path.is_file():
        return False
    try:
        content = json.loads(path.read_text(encoding=encoding_of(path)))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and {"images", "categories", "annotations"} <= content.keys()


def found_in(folder: Path) -> list[Path]:
    """Return the COCO files in a folder or in its folder ``annotations``."""
    places = [folder, folder / "annotations"]
    return [file for place in places if place.is_dir() for file in sorted(place.glob("*.json")) if is_coco(file)]


@dataclass(frozen=True)
class Annotations:
    """The content of a COCO file.

    Attributes:
        images, categories: as in the file; categories by ascending id, which gives the class numbers.
        boxes: of each image: class, x1, y1, x2, y2 in fractions of the picture, and whether it is a crowd.
    """

    images: list[dict[str, Any]]
    categories: list[dict[str, Any]]
    boxes: list[list[list[float]]]


def read_annotations(file: Path, *, where: str) -> Annotations:
    """Read the boxes of a COCO file, without looking for its pictures.

    Raises:
        DatasetError: the file is not COCO JSON; the message names the annotation.
    """
    try:
        content = json.loads(file.read_text(encoding=encoding_of(file)))
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(f"{file.name} is no JSON: {error}", where=where) from error
    try:
        rows: dict[Any, list[list[float]]] = {one["id"]: [] for one in content["images"]}
        sizes = {one["id"]: (float(one["width"]), float(one["height"])) for one in content["images"]}
        kinds = _without_group(content["categories"], content["annotations"])
        numbers = {kind["id"]: number for number, kind in enumerate(kinds)}
        for place, one in enumerate(content["annotations"]):
            rows[one["image_id"]].append(_row(one, numbers, sizes, f"{where}: {file.name}: annotations[{place}]"))
        return Annotations(content["images"], kinds, [rows[one["id"]] for one in content["images"]])
    except KeyError as error:
        raise DatasetError(
            f"{file.name} is no COCO JSON: {error} is missing or refers to nothing", where=where
        ) from error
    except (TypeError, ValueError, AttributeError) as error:
        raise DatasetError(f"{file.name} is no COCO JSON: {error}", where=where) from error


def read(file: Path, pictures: Path, *, where: str) -> Listing:
    """List the pictures that a COCO file names; class numbers follow the order of the category ids.

    Args:
        file: the JSON.
        pictures: the folder of the pictures; they lie in it or in a subfolder with a usual name (``images``,
            ``val2017``, …).

    Raises:
        DatasetError: the file is not COCO JSON, or a picture is missing; the message names it.
    """
    found = read_annotations(file, where=where)
    try:
        names = [str(one["file_name"]) for one in found.images]
        classes = tuple(str(kind["name"]) for kind in found.categories)
    except KeyError as error:
        raise DatasetError(f"{file.name} is no COCO JSON: {error} is missing", where=where) from error
    # Two splits may hold pictures of the same names: those of the file's own split come first.
    own = sorted(_FOLDERS, key=lambda name: not (name and name.rpartition("/")[2] in file.stem.lower()))
    places = [folder / name for folder in (pictures, file.parent, file.parent.parent) for name in own]
    return Listing(
        where=where,
        kind="pictures with COCO annotations",
        item=Item.PICTURE,
        truth=Truth.BOXES,
        sources=[_picture(name, places, file, where) for name in names],
        labels=found.boxes,
        classes=classes,
    )


def _without_group(categories: list[dict[str, Any]], annotations: list[Any]) -> list[dict[str, Any]]:
    """Return the categories by ascending id. The first is left out if it only groups all others and no box is of it:
    Roboflow writes such a one, which its own YOLO exports do not count."""
    kinds = sorted(categories, key=lambda kind: kind["id"])
    if len(kinds) > 1 and kinds[0].get("supercategory") == "none":
        groups = all(one.get("supercategory") == kinds[0]["name"] for one in kinds[1:])
        if groups and not any(one["category_id"] == kinds[0]["id"] for one in annotations):
            return kinds[1:]
    return kinds


def _row(one: Any, numbers: dict[Any, int], sizes: dict[Any, tuple[float, float]], where: str) -> list[float]:
    width, height = sizes[one["image_id"]]
    box = one.get("bbox") or _around(one.get("segmentation"))
    if not isinstance(box, list) or len(box) != 4 or width <= 0 or height <= 0:
        raise DatasetError(f"bbox {box} of a picture of {width:g}x{height:g} is no box", where=where)
    x, y, w, h = (float(value) for value in box)
    if not all(map(math.isfinite, (x, y, w, h))) or w < 0 or h < 0:
        raise DatasetError(f"bbox {box} is no box: x, y, width and height in pixels were expected", where=where)
    kind = float(numbers[one["category_id"]])
    corners = (x / width, y / height, (x + w) / width, (y + h) / height)
    return [kind, *(min(1.0, max(0.0, corner)) for corner in corners), float(one.get("iscrowd", 0))]


def _around(outlines: Any) -> list[float] | None:
    """Return the box around an object's outlines (lists of x, y, x, y, …), for a file of segmentations alone."""
    if not isinstance(outlines, list) or not all(isinstance(one, list) and len(one) >= 2 for one in outlines):
        return None
    across = [float(value) for one in outlines for value in one[0::2]]
    down = [float(value) for one in outlines for value in one[1::2]]
    if not across or not down:
        return None
    return [min(across), min(down), max(across) - min(across), max(down) - min(down)]


def _picture(name: str, places: list[Path], file: Path, where: str) -> Path:
    for place in places:
        if (found := file_at(place, name)) is not None:
            return found
    if Path(name).suffix.lower() not in PICTURE_ENDINGS:
        raise DatasetError(f"{file.name} names {name!r}, which is no picture", where=where)
    raise DatasetError(
        f"{file.name} names {name!r}, which lies nowhere near it",
        where=where,
        remedy="Put the pictures beside the JSON file, or into a folder images/",
    )
