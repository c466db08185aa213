"""Reads labels: COCO JSON, YOLO text files, arrays, lines of text.

All become one array whose first axis is the sample:

- class numbers (N) or a multi-hot matrix (NxC), from ``.npy``, or from ``.txt`` and ``.csv`` with whole numbers;
- boxes: float32 NxMx6, see :data:`kedge.evaluation.metrics.detection.FIELDS`;
- masks: whole numbers NxHxW, from ``.npy``;
- numbers (N, or NxM for M in a line), from ``.npy`` or ``.csv``;
- texts: N strings, from ``.txt``, a line for each sample, or from a ``.csv`` that holds something else than numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge.evaluation.metrics.detection import FIELDS
from kedge.importing.data_folders import coco, yolo
from kedge.importing.data_folders.listing import encoding_of, lines_in
from kedge_protocol.errors import DatasetError

Array = npt.NDArray[Any]

_CLASSES = "classes.txt"
"""Names of classes, which labelImg writes beside the boxes."""
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
        found = padded(coco.read_annotations(path, where=where).boxes)
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
        lines = lines_in(path.read_text(encoding=encoding_of(path)))
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"cannot be read as text: {error}", where=where) from error
    rows = [line.split(",") for line in lines] if path.suffix == ".csv" else [[line] for line in lines]
    # A text file's lines may be texts that look like numbers, as a price that was read.
    for kind in (int, float) if path.suffix == ".csv" else (int,):
        try:
            found = np.asarray([[kind(one) for one in row] for row in rows], np.int64 if kind is int else np.float32)
        except ValueError:
            continue
        return found[:, 0] if found.ndim == 2 and found.shape[1] == 1 else found
    return np.asarray(lines, dtype=np.str_)


def _yolo(path: Path, where: str) -> Array:
    files = sorted(file for file in path.glob("*.txt") if file.name != _CLASSES)
    if not files:
        raise DatasetError("holds no .txt file", where=where, remedy=_REMEDY)
    return padded([yolo.rows(file, None, where=where) for file in files])


def padded(rows: list[list[list[float]]]) -> Array:
    """Return the boxes of all pictures as one array, padded with class -1."""
    most = max(1, *(len(one) for one in rows)) if rows else 1
    made = np.zeros((len(rows), most, FIELDS), dtype=np.float32)
    made[..., 0] = -1
    for number, one in enumerate(rows):
        if one:
            made[number, : len(one)] = one
    return made
