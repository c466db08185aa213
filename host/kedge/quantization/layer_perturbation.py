"""Rounds the weight and the inputs of a single layer as a precision would."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge.quantization.graph_partition import rounded_to_half
from kedge_targets.graph import flat_activations, quantizers, ranges, rounding, weight_encodings
from kedge_targets.graph.layers import Layer
from kedge_targets.graph.quantizers import Quantizer, Style
from kedge_targets.numerics import Family, Plan, Precision, QuantizationScheme, RangeMethod

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]

_HELD_BYTES = 256 << 20
"""Size of the rounded weights that are kept for the next samples; others are computed again."""


class LayerPerturbation:
    """The layers of one graph, each in every precision that it supports.

    Args:
        model: the graph that is run, with constants folded.
        weights: of the layers; tensor name → array.
        precisions: the precisions to choose from.
        quantized: the scheme of int8.
        group_size, asymmetric, seed: for weights in low-bit storage.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        weights: Mapping[str, Array],
        precisions: Sequence[Precision],
        *,
        quantized: QuantizationScheme | None,
        group_size: int,
        asymmetric: bool,
        seed: int,
    ) -> None:
        self._model = model
        self._weights = weights
        self._precisions = [precision for precision in Precision if precision in precisions]
        self._group_size, self._asymmetric, self._seed = group_size, asymmetric, seed
        self._styles = {precision: _style(precision, quantized) for precision in self._precisions}
        self._quantizers = {precision: self._placed(precision) for precision in self._precisions}
        self._ranges: dict[Precision, dict[str, tuple[float, float]]] = {}
        self._altered: dict[tuple[str, Precision], Array | None] = {}
        self._held = 0

    def of(self, layer: Layer) -> list[Precision]:
        """Return the precisions that a layer supports, smallest first."""
        return [precision for precision in self._precisions if self._can(layer, precision)]

    @property
    def passes(self) -> int:
        """Return how often :meth:`observe` reads the samples; 0 if there are no ranges to find."""
        if not self._observed():
            return 0
        return 2 if any(_method(precision) is not RangeMethod.MIN_MAX for precision in self._precisions) else 1

    def observe(self, samples: Iterable[Mapping[str, Array]]) -> None:
        """Observe the ranges of the activations.

        Raises:
            See :func:`kedge_targets.graph.ranges.observe`.
        """
        if not self.passes:
            return
        found = ranges.histograms(self._model, samples, self._observed(), counts=self.passes > 1)
        flat = flat_activations.gates(self._model)
        self._ranges = {
            precision: {
                name: found[name].range(
                    method=_method(precision),
                    percentile=100.0,
                    bits=one.bits,
                    symmetric=one.symmetric and not one.unsigned,
                    beyond=self._styles[precision].beyond,
                    gate=flat.get(name),
                )
                for name, one in placed.items()
                if not one.dynamic
            }
            for precision, placed in self._quantizers.items()
        }

    def changes(self, layer: Layer, precision: Precision, clean: Mapping[str, Array]) -> tuple[dict[str, Array], bool]:
        """Return tensor name → array for each input and weight of the layer that the precision changes, and whether the
        layer's output is rounded to float16.

        Args:
            clean: the layer's inputs in float.
        """
        changed: dict[str, Array] = {}
        if layer.weight is not None:
            weight = self._weight(layer, precision)
            if weight is not None:
                changed[layer.weight] = weight
        for tensor in layer.activations:
            if precision.family is Family.HALF:
                changed[tensor] = rounded_to_half(clean[tensor])
            elif tensor in self._quantizers[precision]:
                changed[tensor] = self._activation(self._quantizers[precision][tensor], precision, clean[tensor])
        return changed, precision.family is Family.HALF

    def _activation(self, one: Quantizer, precision: Precision, values: Array) -> Array:
        if one.dynamic:
            return per_sample(values, one.bits)
        scale, zero, signed = quantizers.integers_of(one, self._ranges[precision])
        least, most = rounding.bounds(one.bits, signed=signed, narrow=signed and one.narrow)
        return rounding.fake_quantize(values, scale, zero, least, most)

    def _weight(self, layer: Layer, precision: Precision) -> Array | None:
        key = (layer.name, precision)
        if key in self._altered:
            return self._altered[key]
        made = self._altered_weight(layer, precision)
        size = 0 if made is None else made.nbytes
        if self._held + size <= _HELD_BYTES:
            self._held += size
            self._altered[key] = made
        return made

    def _altered_weight(self, layer: Layer, precision: Precision) -> Array | None:
        if layer.weight is None:
            return None
        value = self._weights[layer.weight]
        if precision.family is Family.HALF:
            return rounded_to_half(value)
        if precision.family is Family.WEIGHTS:
            return weight_encodings.dequantized(
                value,
                precision,
                axis=layer.axis or 0,
                group_size=self._group_size,
                asymmetric=self._asymmetric,
                seed=self._seed,
            )
        style = self._styles[precision]
        how = quantizers.weight_of(layer, precision, style)
        if how is None:
            return None
        bits, axis = how
        scales = rounding.weight_scales(value, bits=bits, axis=axis, method=style.weight_method)
        return rounding.fake_quantize(value, scales, 0, *rounding.bounds(bits, signed=True, narrow=True), axis)

    def _observed(self) -> list[str]:
        placed = (one for each in self._quantizers.values() for one in each.values() if not one.dynamic)
        return list(dict.fromkeys(one.tensor for one in placed))

    def _placed(self, precision: Precision) -> dict[str, Quantizer]:
        """Return the quantizer of each activation if all layers had this precision."""
        if precision.activation_bits is None:
            return {}
        plan = Plan(default=precision)
        return {one.tensor: one for one in quantizers.place(self._model, plan, style=self._styles[precision])}

    def _can(self, layer: Layer, precision: Precision) -> bool:
        if precision.family is Family.FLOAT:
            return False
        if precision.family is Family.WEIGHTS:
            return layer.weight is not None
        if precision.family is Family.FABRIC:
            # Logic multiplies by constants, and does not look up words.
            return layer.weight is not None and layer.operator != "Gather"
        return True


def per_sample(values: Array, bits: int) -> Array:
    """Round to unsigned integers in the range of each sample (first axis), like DynamicQuantizeLinear: scale = (max -
    min) / levels with 0 in between, zero-point = round(-min / scale)."""
    rows = values.reshape(len(values), -1)
    levels = np.float32(2**bits - 1)
    low, high = np.minimum(rows.min(axis=1), np.float32(0)), np.maximum(rows.max(axis=1), np.float32(0))
    scale = np.maximum((high - low) / levels, np.finfo(np.float32).tiny)
    return rounding.fake_quantize(rows, scale, np.rint(-low / scale), 0, int(levels), 0).reshape(values.shape)


def _style(precision: Precision, quantized: QuantizationScheme | None) -> Style:
    """Return the backend's style, reduced to what a single layer has: its own inputs."""
    if precision.family is Family.FABRIC:
        style = quantizers.FABRIC
    else:
        style = Style() if quantized is None else quantizers.style_for(quantized)
    # A plan can name every layer, products of two activations too.
    products = precision.family is not Family.FABRIC
    return replace(style, at_source=False, relus=False, residuals=False, shared_scales=False, products=products)


def _method(precision: Precision) -> RangeMethod:
    """Return the range method: low bit widths need their own clipping."""
    return RangeMethod.MSE if precision.family is Family.FABRIC else RangeMethod.MIN_MAX
