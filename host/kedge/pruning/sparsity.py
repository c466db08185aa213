"""Zeros among the weights, which stay where they are: without a pattern, or N of M."""

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
    """``n`` of every ``m`` weights that lie side by side along the sum may differ from zero."""

    n: int
    m: int


def pattern(text: str) -> Pattern | None:
    """``2:4`` → a pattern, ``unstructured`` → None.

    Raises:
        ConfigError: neither.
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
    """Weights of layers, by name, and the axis along which their products are summed up.

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
    """Masks, true where a weight stays: all but the smallest of each array, or of all of them together."""
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
    """The ``n`` largest of every ``m`` along an axis, chosen for each row by itself; what does not fill a last ``m``
    stays. None where there are less than ``m``."""
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
    """Bytes of the graph as zlib packs it."""
    return len(zlib.compress(model.SerializeToString(deterministic=True), level=6))
