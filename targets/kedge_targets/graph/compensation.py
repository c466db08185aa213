"""Rounding that makes up for itself: what one weight loses, the weights that are not yet rounded take over, as far as
the samples tell that their inputs go together (Frantar et al., "GPTQ", ICLR 2023; Hassibi and Stork, "Optimal Brain
Surgeon", 1993).

The grid (scales, zero-points, table) of :func:`kedge_targets.graph.weight_forms.encoded` stays; other codes are chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge_targets.graph import library, weight_forms
from kedge_targets.graph.layers import layers
from kedge_targets.graph.weight_forms import Encoded
from kedge_targets.numerics import Family, Precision

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]

LONGEST = 4096
"""Inputs of a layer at most: the matrix of their products has the square of it."""
_DAMPING = 0.01
_SHORTEST = 1e-6
"""Length of a row that counts as one of 0s."""
_BLOCK = 64


def products(
    model: onnx.ModelProto, samples: Iterable[Mapping[str, Array]], precisions: Mapping[str, Precision]
) -> dict[str, Array]:
    """For the input of each MatMul and Gemm that is to be stored small: X'X over all samples, float64 K x K, by the
    tensor's name.

    Each row of X is brought to length 1: in a transformer a few tokens are hundreds of times longer than the rest, and
    what follows normalizes them; the matrix of the plain rows would hold hardly anything else.

    Args:
        model: not changed.
        samples: input name → array; read once.
        precisions: node name → precision.
    """
    import onnx

    wanted = {
        layer.activations[0]: None
        for layer in layers(model)
        if layer.operator in ("MatMul", "Gemm")
        and layer.weight is not None
        and layer.weight_input == 1
        and precisions.get(layer.name, Precision.FLOAT32).family is Family.WEIGHTS
    }
    given = {value.name for value in model.graph.input}
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    have = {value.name for value in probe.graph.output}
    fetched = [name for name in wanted if name not in given]
    probe.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in fetched if name not in have)
    session = library.load().InferenceSession(probe.SerializeToString(), providers=["CPUExecutionProvider"])
    found: dict[str, Array] = {}
    for feed in samples:
        seen = dict(zip(fetched, session.run(fetched, dict(feed)) if fetched else [], strict=True))
        for name in wanted:
            value = np.asarray(seen[name] if name in seen else feed[name])
            if value.ndim < 2 or value.shape[-1] > LONGEST:
                continue
            rows = value.reshape(-1, value.shape[-1]).astype(np.float32)  # a copy
            if name not in found:
                found[name] = np.zeros((rows.shape[1], rows.shape[1]))
            rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), _SHORTEST)
            found[name] += rows.T @ rows
    return found


def compensated(weight: Array, encoded: Encoded, product: Array) -> Encoded:
    """Other codes for a matrix, whose error is small on the samples rather than in the weights themselves.

    Args:
        weight: K x N or N x K, float32.
        encoded: of it; its axis is that of the N channels.
        product: of :func:`products`, K x K.
    """
    matrix = weight_forms.rows(weight, encoded.axis).T.astype(np.float64)
    order, factors = _factors(product)
    matrix = matrix[order]
    levels = _Grid(encoded)
    codes = np.empty(matrix.shape, np.uint8)
    for start in range(0, len(matrix), _BLOCK):
        stop = min(start + _BLOCK, len(matrix))
        errors = np.empty((stop - start, matrix.shape[1]))
        for index in range(start, stop):
            codes[index], value = levels.nearest(matrix[index], int(order[index]))
            error = (matrix[index] - value) / factors[index, index]
            matrix[index + 1 : stop] -= np.outer(factors[index, index + 1 : stop], error)
            errors[index - start] = error
        matrix[stop:] -= factors[start:stop, stop:].T @ errors
    back = np.empty_like(codes)
    back[order] = codes
    made = back if encoded.axis == 1 else back.T
    return replace(encoded, codes=np.ascontiguousarray(made))


def _factors(product: Array) -> tuple[Array, Array]:
    """The order of the inputs, the strongest first, and the upper Cholesky factor of the inverse in that order."""
    diagonal = np.diag(product)
    damped = product + np.eye(len(product)) * max(_DAMPING * float(diagonal.mean()), 1e-12)
    order = np.argsort(-diagonal, kind="stable")
    inverse = np.linalg.inv(damped[np.ix_(order, order)])
    factors: Array = np.linalg.cholesky((inverse + inverse.T) / 2).T
    return order, factors


class _Grid:
    """The values that each weight of a matrix may take."""

    def __init__(self, encoded: Encoded) -> None:
        self._group_size = encoded.group_size or encoded.codes.size  # one group is the whole channel
        self._scales = None if encoded.scales is None else encoded.scales.astype(np.float64)
        self._zero_points = encoded.zero_points
        self._table = encoded.table
        if encoded.table is not None:
            self._order = np.argsort(encoded.table, kind="stable")
            entries = encoded.table[self._order].astype(np.float64)
            self._edges = (entries[1:] + entries[:-1]) / 2

    def nearest(self, values: Array, index: int) -> tuple[Array, Array]:
        """Codes for the weights of all channels at one input, and what they stand for."""
        if self._table is None:
            if self._scales is None or self._zero_points is None:
                return np.zeros(values.shape, np.uint8), values
            group = index // self._group_size
            scales, zeros = self._scales[:, group], self._zero_points[:, group].astype(np.float64)
            codes = np.clip(np.rint(values / scales) + zeros, 0, 15)
            return codes.astype(np.uint8), (codes - zeros) * scales
        scales = np.ones(1) if self._scales is None else self._scales[:, index // self._group_size]
        picked = self._order[np.searchsorted(self._edges, values / scales)]
        return picked.astype(np.uint8), self._table[picked] * scales
