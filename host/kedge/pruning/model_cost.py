"""The cost of a graph: parameters, and multiply-accumulate operations for one sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kedge.pruning.rule_scope import Scope

if TYPE_CHECKING:
    import onnx

Alive = npt.NDArray[np.bool_]


def parameters(model: onnx.ModelProto) -> int:
    """Return the number of elements in floating-point constants."""
    import onnx

    kinds = onnx.TensorProto
    real = (kinds.FLOAT, kinds.FLOAT16, kinds.BFLOAT16, kinds.DOUBLE)
    return sum(math.prod(tensor.dims) for tensor in model.graph.initializer if tensor.data_type in real)


def operations(scope: Scope, alive: Alive | None = None) -> int:
    """Return the multiply-accumulate operations of convolutions and matrix products for one sample; free axes other
    than the batch (such as a sentence's length) count as one.

    Args:
        alive: for each number of the scope, whether it is left; None if all are.
    """

    def length(name: str, axis: int) -> int:
        ids = scope.of(name)[axis]
        one, other = scope.lengths(name)[axis]
        if ids is None:
            return one if one == other else 1
        return len(ids) if alive is None else int(alive[ids].sum())

    total = 0
    for node in scope.model.graph.node:
        count = _COUNTS.get(node.op_type)
        if count is not None and all(scope.known(name) for name in (*node.input, *node.output) if name):
            total += count(node, scope, length)
    return total


Length = Callable[[str, int], int]


def _convolution(node: onnx.NodeProto, scope: Scope, length: Length) -> int:
    made, weight = node.output[0], node.input[1]
    space = math.prod(length(made, axis) for axis in range(2, scope.rank(made)))
    return space * math.prod(length(weight, axis) for axis in range(scope.rank(weight)))


def _transposed(node: onnx.NodeProto, scope: Scope, length: Length) -> int:
    data, weight = node.input[0], node.input[1]
    space = math.prod(length(data, axis) for axis in range(2, scope.rank(data)))
    return space * math.prod(length(weight, axis) for axis in range(scope.rank(weight)))


def _product(node: onnx.NodeProto, scope: Scope, length: Length) -> int:
    made, left = node.output[0], node.input[0]
    rows = math.prod(length(made, axis) for axis in range(scope.rank(made)))
    return rows * length(left, scope.rank(left) - 1)


_COUNTS = {"Conv": _convolution, "ConvTranspose": _transposed, "Gemm": _product, "MatMul": _product}
