"""Quantizes a decoder's layers one after the other: each gets the outputs of the quantized layers before it, and is
released once it is stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from kedge.quantization import decoder_cache
from kedge.quantization.decoder_scheme import Scheme
from kedge_targets.decoder import layout as layouts
from kedge_targets.decoder import rounding
from kedge_targets.decoder.contract import DecoderCompiler, LayerRunner
from kedge_targets.decoder.matrix import Codes, Matrix, real
from kedge_targets.decoder.plan import PROBE_OF, CacheScales, Piece
from kedge_targets.decoder.rounding import Grid, Inputs
from kedge_targets.decoder.spec import Array, DecoderSpec, Weights

Heard = Callable[[int, int], None]
"""Called with the number of layers done and the total number of layers."""


@dataclass
class LayerSource:
    """The float layers of a decoder in a compiler's layout."""

    spec: DecoderSpec
    weights: Weights
    compiler: DecoderCompiler
    context: int

    def piece(self, index: int) -> Piece:
        """Return a layer in float32."""
        layer = layouts.arranged(self.spec, self.compiler.layout(self.spec), self.weights.layer(index))
        return Piece(
            matrices={name: tensor for name, tensor in layer.items() if tensor.ndim == 2},
            vectors={name: tensor for name, tensor in layer.items() if tensor.ndim == 1},
        )

    def runner(self, index: int, piece: Piece) -> LayerRunner:
        """Return a runner for a layer."""
        floats: dict[str, Matrix] = {name: real(matrix) for name, matrix in piece.matrices.items()}
        return self.compiler.layer_runner(
            self.spec, index, Piece(matrices=floats, vectors=piece.vectors), context=self.context
        )


class QuantizedLayers:
    """The quantized layers, callable as :data:`kedge_targets.decoder.plan.Pieces`: in order, each once.

    Args:
        calibration: embedded sequences, float32 [positions, channels] each; updated after each layer.
        heard: called before each layer.

    Attributes:
        damages: of each layer so far, the mean squared error that its codes bring into its output, relative to the
            output, over the calibration; empty where nothing is learned from it.
    """

    def __init__(self, source: LayerSource, scheme: Scheme, calibration: list[Array], heard: Heard) -> None:
        self._source = source
        self._scheme = scheme
        self._hidden = calibration
        self._heard = heard
        self.damages: list[float] = []

    def __call__(self, index: int) -> Piece:
        piece, scheme = self._source.piece(index), self._scheme
        self._heard(index, len(self._source.spec.layers))
        if scheme.cache == "int8":
            _, values = self._cached(self._source.runner(index, piece))
            piece = decoder_cache.shifted(self._source.spec, piece, values)
        inputs, outputs = self._inputs(index, piece) if scheme.learns else ({}, [])
        matrices: dict[str, Matrix] = {
            name: self._rounded(index, name, real(matrix), inputs) if scheme.bits else stored(matrix, scheme.precision)
            for name, matrix in piece.matrices.items()
        }
        made = Piece(matrices=matrices, vectors=piece.vectors)
        if not scheme.calibrated:
            return made
        runner = self._source.runner(index, made)
        if scheme.cache == "int8":
            made = replace(made, cache=self._cache_scales(index, runner))
        self._hidden = [runner.run(hidden)[0] for hidden in self._hidden]
        if outputs:
            self.damages.append(_damage(self._hidden, outputs))
        return made

    def _cache_scales(self, index: int, runner: LayerRunner) -> CacheScales:
        """Return scales for each channel of a layer's keys and values, from the calibration."""
        keys, values = self._cached(runner)
        first = np.mean([one[:, 0] for one in keys], axis=0)
        return decoder_cache.scales(self._anywhere(index, keys), values, first)

    def _cached(self, runner: LayerRunner) -> tuple[list[Array], list[Array]]:
        """Return a layer's keys and values of each calibration text."""
        found = [runner.cached(hidden) for hidden in self._hidden]
        return [key for key, _ in found], [value for _, value in found]

    def _anywhere(self, index: int, keys: list[Array]) -> list[Array]:
        """Return keys as at random later positions: calibration texts are short, and rotation moves a pair's length
        between its channels."""
        source = self._source
        frequencies = source.compiler.layout(source.spec).frequencies(source.spec, source.spec.layers[index])
        random = np.random.default_rng(index)
        found = []
        for key in keys:
            later = random.uniform(0, max(source.context - key.shape[1], 0), key.shape[1])
            found.append(decoder_cache.rotated(key, np.outer(later, frequencies)))
        return found

    def _inputs(self, index: int, piece: Piece) -> tuple[dict[str, Inputs], list[Array]]:
        """Return what compensation needs of each probe over the calibration, and the float layer's outputs."""
        runner = self._source.runner(index, piece)
        products: dict[str, Array] = {}
        outputs = []
        for hidden in self._hidden:
            output, probes = runner.run(hidden)
            outputs.append(output)
            for name, rows in probes.items():
                products[name] = products.get(name, 0) + correlations(rows)
        return {name: Inputs.of(products.pop(name)) for name in list(products)}, outputs

    def _rounded(self, index: int, name: str, weight: Array, inputs: dict[str, Inputs]) -> Codes:
        grid = Grid(bits=self._scheme.bits_of(index), group=self._scheme.group, symmetric=self._scheme.symmetric)
        if not inputs:
            return rounding.plain(weight, grid)
        return rounding.compensated(weight, inputs[PROBE_OF[name]], grid)


def correlations(rows: Array) -> Array:
    """Return X'X of some positions X [positions, channels], float64 [channels, channels].

    Each row is scaled to length 1: a few tokens are hundreds of times longer than the rest, and the norms that follow
    remove this.
    """
    rows = rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-6)
    found: Array = (rows.T @ rows).astype(np.float64)
    return found


def _damage(outputs: list[Array], wanted: list[Array]) -> float:
    """Return the mean over all positions of ``|output - wanted|² / |wanted|²``: a few long tokens do not outweigh the
    others."""
    shares = [
        ((one - other) ** 2).sum(-1) / np.maximum((other**2).sum(-1), 1e-12)
        for one, other in zip(outputs, wanted, strict=True)
    ]
    return float(np.concatenate(shares).mean())


def stored(matrix: Matrix, precision: str) -> Matrix:
    """Return a float matrix as it is stored."""
    values = real(matrix)
    return values.astype(np.float16) if precision == "float16" else values


def table(weight: Array, scheme: Scheme, inputs: Array | None = None) -> Matrix:
    """Return an embedding or a head as it is stored; in float if its channels do not fill whole groups.

    Args:
        inputs: :func:`correlations` of a head's inputs, with which 4 bits are rounded by the scheme's method.
    """
    bits, group = scheme.embedding_bits, scheme.group
    while bits and group > 16 and weight.shape[1] % group:
        group //= 2
    if not bits or weight.shape[1] % group:
        return stored(weight, scheme.embedding)
    grid = Grid(bits=bits, group=group, symmetric=scheme.symmetric)
    if inputs is not None and bits == 4:
        return rounding.compensated(weight, Inputs.of(inputs), grid)
    return rounding.plain(weight, grid, search=bits == 4)
