"""Extracts the rows that a layer multiplies with its weights: the rows of a product, the im2col patches of a
convolution."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge_targets.graph import auto_pad
from kedge_targets.graph.layers import Layer

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]

POSITIONS = 1024
"""Largest number of patches per sample, evenly spread: neighbours hardly differ."""


@dataclass(frozen=True, kw_only=True)
class RowReader:
    """Reads the rows of a layer's input. Layers with equal readers multiply the same rows.

    Attributes:
        tensor: that is read.
        length: numbers in a row.
        groups: of a convolution; each has rows and output channels of its own.
        kernel, strides, dilations: of a convolution, a number for each axis of space; empty for a product.
        pads: before each axis, then behind each; or what ``auto_pad`` says.
    """

    tensor: str
    length: int
    groups: int = 1
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] | str = ()

    def rows(self, value: Array) -> Array:
        """Return the rows that the weights multiply.

        Args:
            value: of the tensor: samples x channels x space, or any shape whose last axis is ``length``.

        Returns:
            A copy, float32, groups x rows x length. In a row of a convolution the channels of its group come first,
            then space, as in a weight.
        """
        if not self.kernel:
            return value.reshape(1, -1, self.length).astype(np.float32)
        space = len(self.kernel)
        spans = [(size - 1) * step + 1 for size, step in zip(self.kernel, self.dilations, strict=True)]
        padded = np.pad(value, ((0, 0), (0, 0), *self._padding(value.shape[2:])))
        axes = tuple(range(2, 2 + space))
        every = np.lib.stride_tricks.sliding_window_view(padded, spans, axis=axes)
        picked = every[
            (
                slice(None),
                slice(None),
                *(slice(None, None, step) for step in self.strides),
                *(slice(None, None, step) for step in self.dilations),
            )
        ]
        # samples x channels x positions x kernel, without a copy until the positions are chosen.
        positions = np.indices(picked.shape[2 : 2 + space]).reshape(space, -1)
        if positions.shape[1] > POSITIONS:
            positions = positions[:, np.linspace(0, positions.shape[1] - 1, POSITIONS).astype(np.int64)]
        chosen = picked[(slice(None), slice(None), *positions)]
        samples, channels, count = chosen.shape[:3]
        parted = chosen.reshape(samples, self.groups, channels // self.groups, count, -1)
        return parted.transpose(1, 0, 3, 2, 4).reshape(self.groups, samples * count, self.length).astype(np.float32)

    def _padding(self, sizes: tuple[int, ...]) -> list[tuple[int, int]]:
        """Return the padding before and after each spatial axis."""
        space = len(self.kernel)
        if isinstance(self.pads, str):
            pads = auto_pad.explicit_pads(self.pads, sizes, self.kernel, self.strides, self.dilations)
        else:
            pads = list(self.pads[:space]), list(self.pads[space:])
        return list(zip(*pads, strict=True))


def read_rows(layer: Layer, node: onnx.NodeProto, shape: tuple[int, ...]) -> RowReader | None:
    """Return the row reader of a layer; None for a look-up, a transposed convolution, or a weight on the left.

    Args:
        shape: of its weight.
    """
    from onnx import helper

    if layer.weight is None or layer.weight_input != 1 or not layer.activations:
        return None
    has: dict[str, Any] = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    tensor = layer.activations[0]
    if layer.operator in ("MatMul", "Gemm"):
        if len(shape) != 2 or has.get("transA", 0) or layer.axis is None:
            return None
        return RowReader(tensor=tensor, length=shape[1 - layer.axis])
    if layer.operator != "Conv":
        return None
    kernel = shape[2:]
    auto = has.get("auto_pad", b"NOTSET").decode()
    return RowReader(
        tensor=tensor,
        length=math.prod(shape[1:]),
        groups=has.get("group", 1),
        kernel=kernel,
        strides=tuple(has.get("strides", [1] * len(kernel))),
        dilations=tuple(has.get("dilations", [1] * len(kernel))),
        pads=auto if auto != "NOTSET" else tuple(has.get("pads", [0] * 2 * len(kernel))),
    )
