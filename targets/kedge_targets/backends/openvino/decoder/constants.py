"""Weight matrices as constants of OpenVINO's intermediate representation: codes stay codes, and the plugins' kernels
read them in this form: integers → Convert → Subtract(zero-points) → Multiply(scales) → Reshape."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_targets.backends.openvino import library
from kedge_targets.decoder.matrix import Codes, Matrix, packed

Array = npt.NDArray[Any]


class Constants:
    """The constants of one model, which use the memory of the arrays they are made from: it keeps them alive until the
    model is written."""

    def __init__(self) -> None:
        openvino = library.load()
        from openvino import opset13

        self._openvino: Any = openvino
        self._ops: Any = opset13
        self._kept: list[Array] = []

    def array(self, array: Array) -> Any:
        """Return a constant."""
        self._kept.append(np.asarray(array, order="C"))
        return self._openvino.op.Constant(self._openvino.Tensor(self._kept[-1], shared_memory=True))

    def integers(self, *values: int) -> Any:
        """Return a constant int64 [count]."""
        return self.array(np.array(values, np.int64))

    def integer(self, value: int) -> Any:
        """Return a scalar int64."""
        return self.array(np.array(value, np.int64))

    def real(self, value: float) -> Any:
        """Return a scalar float32."""
        return self.array(np.array(value, np.float32))

    def matrix(self, matrix: Matrix) -> Any:
        """Return a matrix as a node of float32 [out, in]."""
        ops = self._ops
        if not isinstance(matrix, Codes):
            found = self.array(matrix)
            return found if matrix.dtype == np.float32 else ops.convert(found, "f32")
        codes, scales, zeros = even_groups(matrix)
        values, offsets = (ops.convert(self._codes(part, matrix.bits), "f32") for part in (codes, zeros))
        scaled = ops.multiply(ops.subtract(values, offsets), self.array(scales))
        return ops.reshape(scaled, self.integers(*matrix.shape), special_zero=False)

    def _codes(self, values: Array, bits: int) -> Any:
        if bits == 8:
            return self.array(values)
        # The numbers of the whole tensor lie one after the other, the first of each two in the low half of a byte.
        self._kept.append(packed(np.ascontiguousarray(values).reshape(-1), bits))
        types = self._openvino
        return types.op.Constant(types.Tensor(self._kept[-1], types.Shape(values.shape), types.Type.u4))


def even_groups(matrix: Codes) -> tuple[Array, Array, Array]:
    """Return codes uint8 [out, groups, group], scales float32 and zero-points uint8 [out, groups, 1] in groups that
    divide the input channels, as OpenVINO needs them. A shorter last group splits all others into parts, which share
    their scale."""
    rows, columns = matrix.shape
    group = math.gcd(min(matrix.group, columns), columns)
    owner = np.arange(0, columns, group) // matrix.group
    zeros = np.full((rows, len(owner)), 2 ** (matrix.bits - 1), np.uint8)
    if matrix.zeros is not None:
        zeros = matrix.zeros[:, owner]
    codes = matrix.codes.reshape(rows, len(owner), group)
    return codes, np.ascontiguousarray(matrix.scales[:, owner, None], np.float32), zeros[:, :, None]
