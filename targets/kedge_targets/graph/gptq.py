"""GPTQ: weights that are not yet rounded compensate the error of rounded ones, as far as their inputs correlate on the
samples (Frantar et al., "GPTQ", ICLR 2023; Hassibi and Stork, "Optimal Brain Surgeon", 1993). A convolution is treated
as a product with its im2col rows.

The grid (scales, zero-points, table) of :func:`kedge_targets.graph.weight_encodings.encode` stays; other codes are
chosen, but for the extremes of each group, which the grid was made from: so a weight that was rounded once is rounded
to itself, and what a step of compression rounded is what a backend stores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from kedge_protocol.errors import LoweringError
from kedge_targets.graph import im2col, library, padding, weight_encodings
from kedge_targets.graph.im2col import RowReader
from kedge_targets.graph.layers import layers
from kedge_targets.graph.weight_encodings import Encoded
from kedge_targets.graph.wiring import Wiring
from kedge_targets.numerics import Family, Precision

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]

LONGEST = 4096
"""Largest number of weights per output channel: the matrix of input products has its square."""
_FINE = 8
_DAMPING = 0.01
_SHORTEST = 1e-6
"""Length below which a row counts as zero."""
_BLOCK = 64


def applies(precision: Precision) -> bool:
    """Return whether GPTQ is worthwhile: for weights with fewer than 8 bits."""
    return precision.family is Family.WEIGHTS and precision.weight_bits < _FINE


def products(
    model: onnx.ModelProto,
    samples: Iterable[Mapping[str, Array]],
    precisions: Mapping[str, Precision],
    *,
    fits: Callable[[Precision], bool] = applies,
) -> dict[str, Array]:
    """Return X'X over all samples (float64, groups x K x K) by node name, for each Conv, MatMul and Gemm of a fitting
    precision (those with fewer than 8 bits). Layers with the same input share one. Layers with more weights per channel
    than :data:`LONGEST` are left out.

    Each row of X that a MatMul or Gemm takes is brought to length 1: in a transformer a few tokens are hundreds of
    times longer than the rest, and what follows normalizes them; the matrix of the plain rows would hold hardly
    anything else. Rows of padding (:mod:`kedge_targets.graph.padding`) are left out. Patches of a convolution stay as
    they are.

    Args:
        model: not changed.
        samples: input name → array; read once.
        precisions: node name → precision.

    Raises:
        LoweringError: the graph does not run on a sample.
    """
    import onnx

    readings = _readings(model, precisions, fits)
    if not readings:
        return {}
    each = list(dict.fromkeys(readings.values()))
    wanted = {one.tensor for one in each}
    given = {value.name for value in model.graph.input}
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    have = {value.name for value in probe.graph.output}
    fetched = sorted(wanted - given)
    probe.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in fetched if name not in have)
    session = library.load().InferenceSession(probe.SerializeToString(), providers=["CPUExecutionProvider"])
    found: dict[RowReader, Array] = {}
    for feed in samples:
        try:
            seen = dict(zip(fetched, session.run(fetched, dict(feed)) if fetched else [], strict=True))
        except Exception as error:  # the library's errors have no common base but Exception
            raise LoweringError(
                f"the graph does not run on the calibration samples: {library.reason_of(error)}",
                remedy="Give samples of the shape that the model takes",
            ) from error
        for one in each:
            value = np.asarray(seen[one.tensor] if one.tensor in seen else feed[one.tensor])
            if value.ndim < 2:
                continue
            rows = one.rows(value)
            if not one.kernel:
                real = padding.real_rows(feed, value.shape)
                rows = rows if real is None else rows[:, real]
                rows /= np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), _SHORTEST)
            if one not in found:
                found[one] = np.zeros((one.groups, one.length, one.length))
            found[one] += rows.transpose(0, 2, 1) @ rows
    return {name: found[one] for name, one in readings.items() if one in found}


def _readings(
    model: onnx.ModelProto, precisions: Mapping[str, Precision], fits: Callable[[Precision], bool]
) -> dict[str, RowReader]:
    """Return, by node, how the layers that GPTQ can treat read their inputs."""
    wiring = Wiring(model)
    nodes = {node.name: node for node in model.graph.node}
    found = {}
    for layer in layers(model, wiring):
        precision = precisions.get(layer.name, Precision.FLOAT32)
        weight = wiring.constant(layer.weight) if layer.weight else None
        if weight is None or not fits(precision):
            continue
        one = im2col.read_rows(layer, nodes[layer.name], weight.shape)
        if one is not None and one.length <= LONGEST:
            found[layer.name] = one
    return found


def encode_weights(
    weight: Array,
    precision: Precision,
    product: Array | None,
    *,
    axis: int,
    group_size: int = 32,
    asymmetric: bool = True,
    seed: int = 0,
) -> Encoded:
    """Like :func:`kedge_targets.graph.weight_encodings.encode`, but with codes whose error is small on the samples
    rather than in the weights themselves.

    Args:
        product: of :func:`products`, for this layer; None to round each weight by itself.
    """
    made = weight_encodings.encode(
        weight, precision, axis=axis, group_size=group_size, asymmetric=asymmetric, seed=seed
    )
    return made if product is None else _compensated(weight.astype(np.float32), made, product)


def round_weights(
    model: onnx.ModelProto,
    samples: Iterable[Mapping[str, Array]],
    precisions: Mapping[str, Precision],
    *,
    group_size: int = 32,
    asymmetric: bool = True,
    seed: int = 0,
) -> dict[str, Array]:
    """Return the weights of a graph after rounding, by tensor name, in their own dtype.

    Args:
        model, samples, precisions: see :func:`products`; those of 8 bits are rounded each weight by itself.

    Raises:
        LoweringError: weights that are not finite, or the graph does not run on a sample.
    """
    found = products(model, samples, precisions)
    wiring = Wiring(model)
    made: dict[str, Array] = {}
    for layer in layers(model, wiring):
        precision = precisions.get(layer.name, Precision.FLOAT32)
        if precision.family is not Family.WEIGHTS or layer.weight is None or layer.axis is None or layer.weight in made:
            continue
        weight = wiring.constant(layer.weight)
        if weight is not None:
            codes = encode_weights(
                weight,
                precision,
                found.get(layer.name),
                axis=layer.axis,
                group_size=group_size,
                asymmetric=asymmetric,
                seed=seed,
            )
            made[layer.weight] = codes.decoded().astype(weight.dtype, copy=False)
    return made


def round_to_integers(weight: Array, product: Array, *, axis: int, most: int) -> tuple[Array, float]:
    """Round a weight to integers of -``most`` to ``most`` times a scale for each channel, with which its largest
    magnitude is just held. A backend that rounds it to the same grid again changes nothing.

    Args:
        product: of :func:`products`, for this layer.
        axis: of the output channels.

    Returns:
        The weight in its own dtype, and how much lower the error of the layer's output is on the samples than by
        rounding each weight by itself, in dB; 0 without an error.
    """
    channels = weight_encodings.to_rows(weight.astype(np.float64), axis)
    largest = np.abs(channels).max(axis=1)
    grid = _Integers(np.where(largest > 0, largest, 1.0) / most, most)
    plain = np.stack([grid.nearest(channels[:, place], place) for place in range(channels.shape[1])], axis=1)
    held = np.zeros(channels.shape, bool)
    np.put_along_axis(held, np.abs(channels).argmax(axis=1)[:, None], True, axis=1)
    each = len(channels) // len(product)
    values, errors = np.empty_like(channels), np.zeros(2)
    for start, matrix in zip(range(0, len(channels), each), product, strict=True):
        part = slice(start, start + each)
        mine = _Integers(grid.scales[part], most)
        codes = _codes(channels[part], mine, matrix, held[part], plain[part])
        values[part] = mine.values(codes, 0, everywhere=True)
        for at, one in enumerate((mine.values(plain[part], 0, everywhere=True), values[part])):
            errors[at] += float(np.einsum("ij,jk,ik->", one - channels[part], matrix, one - channels[part]))
    gain = 10 * float(np.log10(errors[0] / errors[1])) if errors.min() > 0 else 0.0
    return weight_encodings.from_rows(values, axis, weight.shape).astype(weight.dtype, copy=False), gain


def _compensated(weight: Array, made: Encoded, product: Array) -> Encoded:
    """Return compensated codes, from X'X of each group of channels."""
    channels = weight_encodings.to_rows(weight, made.axis)
    held = _extremes(channels, made)
    plain = weight_encodings.to_rows(made.codes, made.axis)
    each = len(channels) // len(product)
    codes = []
    for start, matrix in zip(range(0, len(channels), each), product, strict=True):
        part = slice(start, start + each)
        codes.append(_codes(channels[part], _Grid(made, part), matrix, held[part], plain[part]))
    return replace(made, codes=weight_encodings.from_rows(np.concatenate(codes), made.axis, made.codes.shape))


def _extremes(channels: Array, made: Encoded) -> Array:
    """Return which weights keep their codes: the smallest and the largest under each scale; bool, channels x K."""
    length = channels.shape[1]
    groups = weight_encodings.to_groups(channels, made.group_size or length)
    held = np.zeros(groups.shape, bool)
    if made.scales is not None:
        for at in (groups.argmin(axis=-1), groups.argmax(axis=-1)):
            np.put_along_axis(held, at[..., None], True, axis=-1)
    return held.reshape(len(channels), -1)[:, :length]


class _Rounding(Protocol):
    """A grid of values that weights may take."""

    def nearest(self, weights: Array, index: int) -> Array:
        """Return the codes (uint8) of all channels' weights at one input."""

    def values(self, codes: Array, index: int) -> Array:
        """Return the values of these codes."""


def _codes(channels: Array, grid: _Rounding, product: Array, held: Array, plain: Array) -> Array:
    """Return the codes of channels x K weights; those marked by ``held`` are taken from ``plain``."""
    matrix = channels.T.astype(np.float64)
    order, factors = _factors(product)
    matrix = matrix[order]
    codes = np.empty(matrix.shape, np.uint8)
    for start in range(0, len(matrix), _BLOCK):
        stop = min(start + _BLOCK, len(matrix))
        errors = np.empty((stop - start, matrix.shape[1]))
        for index in range(start, stop):
            place = int(order[index])
            codes[index] = np.where(held[:, place], plain[:, place], grid.nearest(matrix[index], place))
            error = (matrix[index] - grid.values(codes[index], place)) / factors[index, index]
            matrix[index + 1 : stop] -= np.outer(factors[index, index + 1 : stop], error)
            errors[index - start] = error
        matrix[stop:] -= factors[start:stop, stop:].T @ errors
    back = np.empty_like(codes)
    back[order] = codes
    return back.T


def _factors(product: Array) -> tuple[Array, Array]:
    """Return the order of the inputs, strongest first, and the upper Cholesky factor of the inverse in that order."""
    diagonal = np.diag(product)
    damped = product + np.eye(len(product)) * max(_DAMPING * float(diagonal.mean()), 1e-12)
    order = np.argsort(-diagonal, kind="stable")
    inverse = np.linalg.inv(damped[np.ix_(order, order)])
    factors: Array = np.linalg.cholesky((inverse + inverse.T) / 2).T
    return order, factors


class _Integers:
    """Symmetric integers, a scale for each channel; codes are 128 above them."""

    def __init__(self, scales: Array, most: int) -> None:
        self.scales = scales
        self._most = most

    def nearest(self, weights: Array, index: int) -> Array:
        """See :class:`_Rounding`."""
        return (np.clip(np.rint(weights / self.scales), -self._most, self._most) + 128).astype(np.uint8)

    def values(self, codes: Array, index: int, *, everywhere: bool = False) -> Array:
        """See :class:`_Rounding`; of all inputs (channels x K) where ``everywhere`` says so."""
        integers: Array = codes.astype(np.float64) - 128
        return integers * (self.scales[:, None] if everywhere else self.scales)


class _Grid:
    """The grid of values that the weights of some channels may take."""

    def __init__(self, encoded: Encoded, channels: slice) -> None:
        self._group_size = encoded.group_size or encoded.codes.size  # one group is the whole channel
        self._scales = None if encoded.scales is None else encoded.scales[channels].astype(np.float64)
        self._zero_points = None if encoded.zero_points is None else encoded.zero_points[channels].astype(np.float64)
        self._table = encoded.table
        if encoded.table is not None:
            self._order = np.argsort(encoded.table, kind="stable")
            entries = encoded.table[self._order].astype(np.float64)
            self._edges = (entries[1:] + entries[:-1]) / 2

    def nearest(self, weights: Array, index: int) -> Array:
        """Return the codes (uint8) of all channels' weights at one input."""
        scales = self._scale(index)
        if self._table is None:
            return np.clip(np.rint(weights / scales) + self._zero(index), 0, 15).astype(np.uint8)
        picked: Array = self._order[np.searchsorted(self._edges, weights / scales)]
        return picked.astype(np.uint8)

    def values(self, codes: Array, index: int) -> Array:
        """Return the values of these codes."""
        levels = codes - self._zero(index) if self._table is None else self._table[codes]
        values: Array = levels * self._scale(index)
        return values

    def _scale(self, index: int) -> Array | float:
        return 1.0 if self._scales is None else self._scales[:, index // self._group_size]

    def _zero(self, index: int) -> Array | float:
        return 0.0 if self._zero_points is None else self._zero_points[:, index // self._group_size]
