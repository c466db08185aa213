"""What is in the fabric: a graph that a "bitfile" holds, computed on streams of packed words.

The words are unpacked here by what FINN documents of them (the first element in the least significant bits, bytes in
little-endian order, padded to whole bytes), not by the driver's own functions.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_targets.backends.finn import datatypes, graph_file
from kedge_targets.backends.finn.simulator import Simulator

Array = npt.NDArray[Any]


def configure(bitfile: Path) -> None:
    """Put a bitstream into the fabric."""
    if not zipfile.is_zipfile(bitfile):
        raise RuntimeError("the bitstream is not for this part")
    _state().write_text(str(bitfile.resolve()))


def stream(raw: bytes, samples: int) -> bytes:
    """What comes out for packed samples, by whatever is in the fabric."""
    loaded = _loaded(_state().read_text())
    given = _unpacked(raw, samples, loaded.io, "i")
    return _packed(loaded.simulator.run([given])[0], loaded.io, "o")


class _Loaded:
    def __init__(self, bitfile: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            with zipfile.ZipFile(bitfile) as archive:
                archive.extractall(folder)
            self.simulator = Simulator(graph_file.read(Path(folder) / graph_file.GRAPH))
            self.io = json.loads((Path(folder) / "io.json").read_text())


_loaded = functools.lru_cache(maxsize=None)(_Loaded)


def _state() -> Path:
    return Path(os.environ["FAKE_PYNQ_STATE"])


def _type(io: dict[str, Any], side: str) -> tuple[str, int]:
    """Name and bits of a side's datatype."""
    name = io[f"{side}dt"][0].split("'")[1]
    if name == "FLOAT32":
        return name, 32
    found = datatypes.integers(name)
    assert found is not None, name
    return name, 1 if name in ("BIPOLAR", "BINARY") else max((found.high - found.low).bit_length(), 1)


def _unpacked(raw: bytes, samples: int, io: dict[str, Any], side: str) -> Array:
    name, bits = _type(io, side)
    *outer, inner = io[f"{side}shape_folded"][0][1:]
    words = np.frombuffer(raw, np.uint8).reshape(-1, *io[f"{side}shape_packed"][0][1:])[:samples]
    codes = np.unpackbits(words, axis=-1, bitorder="little")[..., : inner * bits]
    values = codes.reshape(samples, *outer, inner, bits).astype(np.uint64) @ (1 << np.arange(bits, dtype=np.uint64))
    shape = (samples, *io[f"{side}shape_normal"][0][1:])
    if name == "FLOAT32":
        return values.astype(np.uint32).view(np.float32).reshape(shape)
    if name == "BIPOLAR":
        return (2 * values.astype(np.int64) - 1).reshape(shape)
    signed = values.astype(np.int64)
    if not name.startswith(("UINT", "BINARY")):
        signed -= (signed >> (bits - 1)) << bits
    return signed.reshape(shape)


def _packed(values: Array, io: dict[str, Any], side: str) -> bytes:
    name, bits = _type(io, side)
    folded = values.reshape(len(values), *io[f"{side}shape_folded"][0][1:])
    if name == "FLOAT32":
        codes = folded.astype(np.float32).view(np.uint32).astype(np.uint64)
    elif name == "BIPOLAR":
        codes = (folded > 0).astype(np.uint64)
    else:
        codes = folded.astype(np.int64).astype(np.uint64)
    places = (codes[..., None] >> np.arange(bits, dtype=np.uint64)) & np.uint64(1)
    flat = places.astype(np.uint8).reshape(*folded.shape[:-1], -1)
    return np.packbits(flat, axis=-1, bitorder="little").tobytes()
