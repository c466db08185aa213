"""Sparsity: weights set to zero in place, without a pattern or N of M."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.errors import ConfigError

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]

# Operators whose second input is the weight, and the axis of it along which products are summed up.
_SUMMED = {"Conv": 1, "ConvTranspose": 0, "Gemm": 0, "MatMul": -2}


@dataclass(frozen=True)
class Pattern:
    """N:M sparsity: at most ``n`` of every ``m`` adjacent weights along the summed axis differ from zero."""

    n: int
    m: int


def pattern(text: str) -> Pattern | None:
    """Parse a pattern such as ``2:4``; ``unstructured`` gives None.

    Raises:
        ConfigError: the text is neither.
    """
    if text == "unstructured":
        return None
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if found is None or not 0 < int(found[1]) < int(found[2]):
        raise ConfigError(
            f"pattern {text!r} is not known", where="sparsify", remedy="Write unstructured, or N:M with N below M: 2:4"
        )
    return Pattern(int(found[1]), int(found[2]))


def weights(model: onnx.ModelProto, leave: Sequence[str]) -> dict[str, int]:
    """Return the weights of layers: name → the axis along which their products are summed.

    Args:
        leave: nodes whose weights are left out.
    """
    constants = {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}
    found: dict[str, int] = {}
    left_out: set[str] = set()
    for node in model.graph.node:
        if node.op_type not in _SUMMED or node.domain not in ("", "ai.onnx") or len(node.input) < 2:
            continue
        name = node.input[1]
        if constants.get(name, 0) < 2:
            continue
        if node.name in leave:
            left_out.add(name)
        transposed = node.op_type == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute)
        found[name] = (1 if transposed else _SUMMED[node.op_type]) % constants[name]
    return {name: axis for name, axis in found.items() if name not in left_out}


def smallest(arrays: Mapping[str, Array], ratio: float, *, together: bool) -> dict[str, Mask]:
    """Return masks, true where a weight stays: all but the smallest of each array, or of all arrays together."""
    if together:
        every = np.sort(np.concatenate([np.abs(array).ravel() for array in arrays.values()]))
        count = int(len(every) * ratio)
        bound = every[count - 1] if count else -np.inf
        return {name: np.abs(array) > bound for name, array in arrays.items()}
    masks = {}
    for name, array in arrays.items():
        mask = np.ones(array.size, dtype=bool)
        mask[np.argsort(np.abs(array).ravel(), kind="stable")[: int(array.size * ratio)]] = False
        masks[name] = mask.reshape(array.shape)
    return masks


def best_of(array: Array, axis: int, chosen: Pattern) -> Mask | None:
    """Return a mask of the ``n`` largest of every ``m`` along an axis, chosen for each row separately; an incomplete
    last block stays. None if there are fewer than ``m``."""
    moved = np.moveaxis(np.abs(array), axis, -1)
    whole = moved.shape[-1] // chosen.m * chosen.m
    if not whole:
        return None
    blocks = moved[..., :whole].reshape(*moved.shape[:-1], -1, chosen.m)
    order = np.argsort(-blocks, axis=-1, kind="stable")
    kept = np.zeros(blocks.shape, dtype=bool)
    np.put_along_axis(kept, order[..., : chosen.n], True, axis=-1)
    mask = np.ones(moved.shape, dtype=bool)
    mask[..., :whole] = kept.reshape(*moved.shape[:-1], whole)
    return np.moveaxis(mask, -1, axis)


def compressed(model: onnx.ModelProto) -> int:
    """Return the size of the graph in bytes after zlib compression."""
    return len(zlib.compress(model.SerializeToString(deterministic=True), level=6))
