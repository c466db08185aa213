"""Finds the constants of a graph that training changes: the weights, by where they are used."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnx


class Role(str, enum.Enum):
    """The role of a trained constant."""

    WEIGHT = "weight"  # of a convolution or a product
    BIAS = "bias"  # and factors, of layers and of normalizations: one number for each channel
    STEP = "step"  # the size of one step of a quantizer


_PASSING = frozenset({"Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Cast", "Flatten", "Expand"})
"""Operators that leave the role of a constant unchanged."""
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
"""Operator → input → role of a constant there. Embeddings (Gather) are not trained: few samples touch few rows."""
_LARGEST = 1e4
"""Masks hold minus infinity or values nearly as large; weights never come near."""


def trainable_weights(model: onnx.ModelProto, constants: dict[str, npt.NDArray[Any]]) -> dict[str, Role]:
    """Return the constants that training may change, in the order in which the graph uses them.

    Args:
        constants: all constants of the main graph, by tensor name.
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
