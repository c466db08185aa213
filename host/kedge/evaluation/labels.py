"""Reads labels: COCO JSON, YOLO text files, arrays, lines of text.

All become one array whose first axis is the sample:

- class numbers (N) or a multi-hot matrix (NxC), from ``.npy``, or from ``.txt`` and ``.csv`` with whole numbers;
- boxes: float32 NxMx6, see :data:`kedge.evaluation.metrics.detection.FIELDS`;
- masks: whole numbers NxHxW, from ``.npy``;
- texts: N strings, from ``.txt``, a line for each sample.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge.evaluation.metrics.detection import FIELDS
from kedge_protocol.errors import DatasetError

Array = npt.NDArray[Any]

_YOLO = 5
_REMEDY = (
    "Give COCO JSON, a folder of YOLO text files, an .npy array, or a .txt or .csv file with a line for each sample"
)


def read(path: Path, samples: int) -> Array:
    """Read labels.

    Args:
        path: a COCO ``.json``, a folder of YOLO ``.txt`` files, an ``.npy``, or a ``.txt`` or ``.csv`` file.
        samples: how many the evaluation set has. The labels must be as many, in the same order: COCO's by the order of
            its ``images``, YOLO's by the files' names.

    Raises:
        DatasetError: nothing there, no such file, damaged, or labels for another number of samples.
    """
    where = f"labels {path}"
    if path.is_dir():
        found = _yolo(path, where)
    elif not path.is_file():
        raise DatasetError("is neither a file nor a folder", where=where, remedy=_REMEDY)
    elif path.suffix == ".json":
        found = _coco(path, where)
    elif path.suffix == ".npy":
        found = _array(path, where)
    elif path.suffix in (".txt", ".csv"):
        found = _lines(path, where)
    else:
        raise DatasetError(
            f"{path.suffix or 'a file without an ending'} is no form of labels", where=where, remedy=_REMEDY
        )
    if len(found) != samples:
        raise DatasetError(f"holds labels of {len(found)} samples, the evaluation set has {samples}", where=where)
    return found


def _array(path: Path, where: str) -> Array:
    try:
        array: Array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DatasetError(f"cannot be read: {error}", where=where) from error
    if array.ndim == 0:
        raise DatasetError("holds one number, labels of samples were expected", where=where)
    return array


def _lines(path: Path, where: str) -> Array:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"cannot be read as text: {error}", where=where) from error
    try:
        return np.asarray([int(line) for line in lines], dtype=np.int64)
    except ValueError:
        return np.asarray(lines, dtype=np.str_)


def _coco(path: Path, where: str) -> Array:
    """Read COCO JSON. Class numbers follow the order of the category ids, as in detectors trained on COCO."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        pictures = {one["id"]: (number, one["width"], one["height"]) for number, one in enumerate(content["images"])}
        classes = {one: number for number, one in enumerate(sorted(kind["id"] for kind in content["categories"]))}
        rows: list[list[list[float]]] = [[] for _ in pictures]
        for one in content["annotations"]:
            number, width, height = pictures[one["image_id"]]
            x, y, w, h = (float(value) for value in one["bbox"])
            box = [x / width, y / height, (x + w) / width, (y + h) / height]
            rows[number].append([classes[one["category_id"]], *box, float(one.get("iscrowd", 0))])
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DatasetError(f"is no JSON: {error}", where=where) from error
    except KeyError as error:
        raise DatasetError(f"is no COCO JSON: {error} is missing or refers to nothing", where=where) from error
    except (TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
        raise DatasetError(f"is no COCO JSON: {error}", where=where) from error
    return padded(rows)


def _yolo(path: Path, where: str) -> Array:
    files = sorted(path.glob("*.txt"))
    if not files:
        raise DatasetError("holds no .txt file", where=where, remedy=_REMEDY)
    return padded([_yolo_file(file, where) for file in files])


def _yolo_file(file: Path, where: str) -> list[list[float]]:
    rows = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{file.name} cannot be read as text: {error}", where=where) from error
    for number, line in enumerate(lines, start=1):
        fields = line.split()
        if not fields:
            continue
        try:
            kind, x, y, w, h = int(fields[0]), *(float(value) for value in fields[1:_YOLO])
        except ValueError as error:
            raise DatasetError(
                f"{file.name}, line {number}: a class and four numbers (centre, width, height) were expected",
                where=where,
            ) from error
        rows.append([float(kind), x - w / 2, y - h / 2, x + w / 2, y + h / 2, 0.0])
    return rows


def padded(rows: list[list[list[float]]]) -> Array:
    """Return the boxes of all pictures as one array, padded with class -1."""
    most = max(1, *(len(one) for one in rows)) if rows else 1
    made = np.zeros((len(rows), most, FIELDS), dtype=np.float32)
    made[..., 0] = -1
    for number, one in enumerate(rows):
        if one:
            made[number, : len(one)] = one
    return made
