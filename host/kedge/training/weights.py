"""Which constants of a graph are what training learns: the weights, by where they are used."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnx


class Role(str, enum.Enum):
    """What a trained constant is."""

    WEIGHT = "weight"  # of a convolution or a product
    BIAS = "bias"  # and factors, of layers and of normalizations: one number for each channel
    STEP = "step"  # the size of one step of a quantizer


_PASSING = frozenset({"Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Cast", "Flatten", "Expand"})
"""A constant that only goes through these is still what it was."""
_QUANTIZING = frozenset({"Quant", "BipolarQuant", "QuantizeLinear", "DequantizeLinear"})
_PLACES: dict[str, dict[int, Role]] = {
    "Conv": {1: Role.WEIGHT, 2: Role.BIAS},
    "ConvTranspose": {1: Role.WEIGHT, 2: Role.BIAS},
    "Gemm": {0: Role.WEIGHT, 1: Role.WEIGHT, 2: Role.BIAS},
    "MatMul": {0: Role.WEIGHT, 1: Role.WEIGHT},
    "Einsum": {0: Role.WEIGHT, 1: Role.WEIGHT},
    "BatchNormalization": {1: Role.BIAS, 2: Role.BIAS},
    "InstanceNormalization": {1: Role.BIAS, 2: Role.BIAS},
    "GroupNormalization": {1: Role.BIAS, 2: Role.BIAS},
    "LayerNormalization": {1: Role.BIAS, 2: Role.BIAS},
    "RMSNormalization": {1: Role.BIAS},
    "PRelu": {1: Role.BIAS},
    "Add": {0: Role.BIAS, 1: Role.BIAS},
    "Sub": {0: Role.BIAS, 1: Role.BIAS},
    "Mul": {0: Role.BIAS, 1: Role.BIAS},
    "Quant": {1: Role.STEP},
    "BipolarQuant": {1: Role.STEP},
    "QuantizeLinear": {1: Role.STEP},
    "DequantizeLinear": {1: Role.STEP},
}
"""Operator → input → what a constant there is. Embeddings (Gather) stay as they are: few samples touch few rows."""
_LARGEST = 1e4
"""Masks hold minus infinity or as good as; weights never come near."""


def trainable_weights(model: onnx.ModelProto, constants: dict[str, npt.NDArray[Any]]) -> dict[str, Role]:
    """The constants that training may change, in the graph's order of use.

    Args:
        constants: every constant of the main graph, by tensor name.
    """
    maker = {tensor: node for node in model.graph.node for tensor in node.output}
    found: dict[str, Role] = {}

    def source(name: str) -> str | None:
        for _ in range(len(model.graph.node) + 1):
            if name in constants:
                return name
            node = maker.get(name)
            if node is None or node.op_type not in _PASSING | _QUANTIZING:
                return None
            name = node.input[0]
        return None

    for node in model.graph.node:
        for index, role in _PLACES.get(node.op_type, {}).items():
            if index >= len(node.input) or (name := source(node.input[index])) is None:
                continue
            values = constants[name]
            if values.dtype.kind != "f" or not values.size or not np.isfinite(values).all():
                continue
            # A lone number in arithmetic is part of the formula (an epsilon, a square root of two), not learnt.
            if role is Role.BIAS and node.op_type in ("Add", "Sub", "Mul") and values.size == 1:
                continue
            if role is Role.STEP and not (values > 0).all():
                continue
            if role is Role.STEP or np.abs(values).max() < _LARGEST:
                found.setdefault(name, role)
    return found
