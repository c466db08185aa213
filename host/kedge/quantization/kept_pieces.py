"""Keeps the layers that were learned from calibration on disk, so that another backend or target stores the same codes
without learning them again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge.quantization.decoder_layers import QuantizedLayers
from kedge.quantization.decoder_scheme import Scheme
from kedge_protocol import digest
from kedge_targets.decoder.matrix import Codes, Matrix, packed
from kedge_targets.decoder.plan import CacheScales, Piece, Pieces

Array = npt.NDArray[Any]


class KeptPieces:
    """Layers that are written down as they are made; callable as :data:`kedge_targets.decoder.plan.Pieces`.

    Args:
        pieces: makes each layer, in order, once.
        folder: gets one file for each layer; it is not there yet, or holds all layers, or those of a compilation that
            failed, which are made anew.
    """

    def __init__(self, pieces: Pieces, folder: Path) -> None:
        self._pieces = pieces
        self._folder = folder
        self._damages = folder / "damages.json"
        self.complete = self._damages.is_file()
        """Whether all layers were made before."""
        if not self.complete:
            self.forget()
            folder.mkdir(parents=True)

    def __call__(self, index: int) -> Piece:
        piece = self._pieces(index)
        arrays: dict[str, Any] = dict(_flattened(piece))
        np.savez(self._path(index), **arrays)
        return piece

    def again(self, index: int) -> Piece:
        """Return a layer that was made before."""
        with np.load(self._path(index)) as stored:
            return _restored(dict(stored))

    def finish(self, damages: Sequence[float]) -> None:
        """Note that all layers are made, and :attr:`kedge.quantization.decoder_layers.QuantizedLayers.damages`."""
        if not self.complete:
            self._damages.write_text(json.dumps(list(damages)), encoding="ascii")
            self.complete = True

    def damages(self) -> list[float]:
        """Return what :meth:`finish` noted."""
        found: list[float] = json.loads(self._damages.read_text(encoding="ascii"))
        return found

    def forget(self) -> None:
        """Delete the files."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, index: int) -> Path:
        return self._folder / f"{index}.npz"


@dataclass(frozen=True)
class Learned:
    """The layers of a scheme.

    Attributes:
        pieces: makes them, or reads them again.
        kept: where they are written down.
        damages: see :class:`kedge.quantization.decoder_layers.QuantizedLayers`; filled as they are made.
    """

    scheme: Scheme
    pieces: Pieces
    kept: KeptPieces | None
    damages: list[float]


class LearnedLayers:
    """The layers of the schemes that are tried, learned from calibration once.

    Args:
        folder: where they are kept.
        shared: whether other targets look for them there.
    """

    def __init__(self, folder: Path, *, shared: bool) -> None:
        self._folder = folder
        self._shared = shared
        self._last: Learned | None = None

    def of(self, scheme: Scheme, layers: QuantizedLayers, *, form: object, again: bool) -> Learned:
        """Return the layers of a scheme: those of the scheme before where only the embedding differs, or of the target
        before.

        Args:
            layers: makes them.
            form: what else they depend on, with a ``repr`` that tells it.
            again: whether they will be wanted once more on this target.
        """
        last = self._last
        if last is not None and last.kept is not None:
            if last.scheme.same_layers(scheme):
                return replace(last, scheme=scheme, pieces=last.kept.again)
            if not self._shared:
                last.kept.forget()
        kept = None
        if scheme.calibrated and (again or self._shared):
            name = digest.of_bytes(repr((form, replace(scheme, embedding=""))).encode())
            kept = KeptPieces(layers, self._folder / digest.hex_of(name))
        if kept is not None and kept.complete:
            self._last = Learned(scheme, kept.again, kept, kept.damages())
        else:
            self._last = Learned(scheme, kept or layers, kept, layers.damages)
        return self._last


def _flattened(piece: Piece) -> dict[str, Array]:
    found = {f"vector/{name}": value for name, value in piece.vectors.items()}
    for name, matrix in piece.matrices.items():
        if not isinstance(matrix, Codes):
            found[f"matrix/{name}"] = matrix
            continue
        found[f"codes/{name}"] = packed(matrix.codes, matrix.bits)
        found[f"form/{name}"] = np.array([matrix.bits, matrix.group, matrix.shape[1]])
        found[f"scales/{name}"] = matrix.scales
        if matrix.zeros is not None:
            found[f"zeros/{name}"] = matrix.zeros
    if piece.cache is not None:
        found |= {"cache/keys": piece.cache.keys, "cache/values": piece.cache.values}
    return found


def _restored(stored: dict[str, Array]) -> Piece:
    def part(kind: str) -> dict[str, Array]:
        return {name.split("/")[1]: value for name, value in stored.items() if name.startswith(f"{kind}/")}

    matrices: dict[str, Matrix] = dict(part("matrix"))
    scales, zeros, forms = part("scales"), part("zeros"), part("form")
    for name, raw in part("codes").items():
        bits, group, columns = (int(value) for value in forms[name])
        codes = raw if bits == 8 else np.stack([raw & 15, raw >> 4], axis=-1).reshape(len(raw), -1)[:, :columns]
        matrices[name] = Codes(codes=codes, scales=scales[name], zeros=zeros.get(name), bits=bits, group=group)
    cache = part("cache")
    kept = CacheScales(keys=cache["keys"], values=cache["values"]) if cache else None
    return Piece(matrices=matrices, vectors=part("vector"), cache=kept)
