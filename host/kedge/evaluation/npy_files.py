"""Opens ``.npy`` files of the user and of the worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.errors import DatasetError
from kedge_protocol.npz import UNREADABLE

Array = npt.NDArray[Any]


def open_array(path: Path, *, name: str, where: str) -> Array:
    """Map an ``.npy`` file.

    Raises:
        DatasetError: not such a file, cut short, or an array of Python objects.
    """
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
        if dtype.hasobject:
            raise DatasetError(
                f"array {name!r} holds Python objects",
                where=where,
                remedy="Store plain numbers, and texts as array.astype(str)",
            )
        if 0 in shape:
            return np.zeros(shape, dtype)
        mapped: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except UNREADABLE as error:
        raise DatasetError(f"array {name!r} cannot be read: {error}", where=where) from error
    return mapped
