"""Reads tensors in safetensors files, one at a time, on demand.

The format (huggingface/safetensors, "Format"): eight bytes of length, a JSON header ``{name: {dtype, shape,
data_offsets}}``, the data. It is not read by the library, which maps whole files, so that they count as the process's
memory, and has no BF16 for numpy (decision 028).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.errors import ModelError

Array = npt.NDArray[Any]

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
_MAX_HEADER = 100 << 20
_TYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F64": np.dtype("<f8"),
}
_AGAIN = "Fetch the file again"


@dataclass(frozen=True)
class _Place:
    """The location of a tensor in a file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def read(self) -> Array:
        if self.dtype not in _TYPES:
            raise ModelError(
                f"the tensor's type {self.dtype} is not read",
                where=str(self.path),
                remedy=f"Known are {', '.join(_TYPES)}: save the model unquantized",
            )
        values = np.fromfile(self.path, _TYPES[self.dtype], count=math.prod(self.shape), offset=self.offset)
        if self.dtype == "BF16":
            # BF16 is the upper half of a float32.
            values = (values.astype(np.uint32) << 16).view(np.float32)
        found: Array = values.astype(np.float32, copy=False).reshape(self.shape)
        return found


class Tensors:
    """The tensors of one or several files, by name.

    Args:
        places: location of each tensor.
        where: for error messages.
    """

    def __init__(self, places: Mapping[str, _Place], where: str) -> None:
        self._places = dict(places)
        self._where = where

    @property
    def names(self) -> set[str]:
        """Return the names of all tensors."""
        return set(self._places)

    @property
    def parameters(self) -> int:
        """Return the total number of weights."""
        return sum(math.prod(place.shape) for place in self._places.values())

    @property
    def files(self) -> list[Path]:
        """Return the files, sorted."""
        return sorted({place.path for place in self._places.values()})

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape; see :meth:`read`."""
        return self._place(name).shape

    def read(self, name: str) -> Array:
        """Return a tensor as float32.

        Raises:
            ModelError: there is no such tensor, or its type is not supported.
        """
        return self._place(name).read()

    def _place(self, name: str) -> _Place:
        if name not in self._places:
            raise ModelError(
                f"has no tensor {name!r}", where=self._where, remedy="config.json and the weights belong together"
            )
        return self._places[name]


def of_folder(folder: Path, *, whole: str = WHOLE, index: str = INDEX) -> Tensors:
    """Return the weights of a folder: one file, or the shards that an index names.

    Raises:
        ModelError: there are none, or a file is truncated or damaged, or a shard is missing.
    """
    if (folder / whole).is_file():
        return Tensors(_header(folder / whole), str(folder))
    if not (folder / index).is_file():
        others = sorted(folder.glob("*.gguf"))
        raise ModelError(
            f"holds neither {whole} nor {index}",
            where=str(folder),
            remedy=f"Give a file in it, as {others[0].name}"
            if others
            else "Give the model's weights as safetensors (model.save_pretrained writes them)",
        )
    found: dict[str, _Place] = {}
    for shard in sorted(set(_weight_map(folder / index).values())):
        if Path(shard).name != shard:
            raise ModelError(f"names the shard {shard!r}, which is no plain file name", where=str(folder / index))
        if not (folder / shard).is_file():
            raise ModelError(f"the shard {shard} is missing", where=str(folder), remedy="Fetch all shards")
        found |= _header(folder / shard)
    missing = sorted(set(_weight_map(folder / index)) - set(found))
    if missing:
        raise ModelError(f"no shard holds the tensor {missing[0]!r}", where=str(folder / index), remedy=_AGAIN)
    return Tensors(found, str(folder))


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(shard) for name, shard in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"is no index of shards: {error}", where=str(index), remedy=_AGAIN) from error


def _header(path: Path) -> dict[str, _Place]:
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, _MAX_HEADER):
                raise ModelError("is cut short, or no safetensors file", where=str(path), remedy=_AGAIN)
            header = json.loads(file.read(length))
        places = {
            name: _place(path, entry, 8 + length, size, name)
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"is no safetensors file: {error}", where=str(path), remedy=_AGAIN) from error
    return places


def _place(path: Path, entry: Any, base: int, size: int, name: str) -> _Place:
    shape = tuple(int(axis) for axis in entry["shape"])
    first, last = (int(offset) for offset in entry["data_offsets"])
    dtype = str(entry["dtype"])
    if base + last > size:
        raise ModelError(
            f"is cut short: the tensor {name!r} ends at byte {base + last}, the file at {size}",
            where=str(path),
            remedy=_AGAIN,
        )
    width = _TYPES[dtype].itemsize if dtype in _TYPES else None
    if first < 0 or min(shape, default=0) < 0 or (width is not None and last - first != width * math.prod(shape)):
        raise ModelError(f"the tensor {name!r} has not the size that its shape says", where=str(path), remedy=_AGAIN)
    return _Place(path, dtype, shape, base + first)
