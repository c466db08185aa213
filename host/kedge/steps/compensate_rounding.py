"""Rounds the weights of integer layers so that their errors compensate each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import numpy.typing as npt

from kedge.options import Option
from kedge.quantization import equalization
from kedge.step import Context, Step
from kedge.steps.limited_samples import LimitedSamples
from kedge_protocol.errors import ConfigError
from kedge_targets.graph import gptq, quantizers
from kedge_targets.graph.layers import Layer, layers
from kedge_targets.numerics import Precision

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]

_MOST = {8: 127, 7: 64}
"""Bits of a weight → its largest integer; of 7 bits the lowest one is used, on both sides."""
_OPERATORS = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True, kw_only=True)
class CompensateRoundingOptions:
    """Options of compensated rounding."""

    samples: Annotated[int, Option("Largest number of calibration samples.")] = 32


class CompensateRounding(Step[CompensateRoundingOptions]):
    """Rounds the weights of the plan's int8 layers to their own grid, where weights that are not yet rounded compensate
    the errors of those that are, on the calibration samples (Frantar et al., "GPTQ", ICLR 2023). The backend then
    rounds them to themselves. Layers that the plan leaves in float keep their weights."""

    name: ClassVar[str] = "compensate-rounding"
    Options = CompensateRoundingOptions

    def apply(self, model: onnx.ModelProto, context: Context) -> onnx.ModelProto:
        """See :class:`kedge.step.Step`. BatchNormalization behind convolutions is folded first; weights that several
        nodes read, or that have one scale for all channels, stay.

        Raises:
            ConfigError: no samples are asked for.
            LoweringError: the graph does not run on a sample.
        """
        import onnx

        if self.options.samples < 1:
            raise ConfigError("samples is below 1", where=self.name, remedy="Give 1 or more")
        made = onnx.ModelProto()
        made.CopyFrom(model)
        equalization.fold_batch_normalization(made)
        weights = equalization.Weights(made)
        chosen = _chosen(made, weights, context)
        found = gptq.products(
            made,
            LimitedSamples(context, self.options.samples),
            dict.fromkeys(chosen, Precision.INT8),
            fits=lambda precision: precision is Precision.INT8,
        )
        gains = []
        for name, (layer, axis, most) in chosen.items():
            weight = weights.own(layer.weight or "")
            if weight is None or name not in found:
                continue
            rounded, gain = gptq.round_to_integers(weight, found[name], axis=axis, most=most)
            weights.replace(layer.weight or "", rounded)
            gains.append(gain)
        typical = float(np.median(gains)) if gains else 0.0
        said = "the plan rounds no weights with a scale for each channel"
        if gains:
            said = f"{len(gains)} layers, the error of their outputs is {typical:.1f} dB lower in the median"
        context.notes.append(f"{self.name}: {said}")
        context.figures |= {"compensate-rounding.layers": len(gains), "compensate-rounding.gain_db": typical}
        return made


def _chosen(
    model: onnx.ModelProto, weights: equalization.Weights, context: Context
) -> dict[str, tuple[Layer, int, int]]:
    """Return the layers to round, by name, each with the axis of its scales and its largest integer."""
    style = quantizers.style_of(context.plan)
    found = {}
    for layer in layers(model, weights.wiring):
        precision = quantizers.precision_of(layer.name, context.plan)
        if precision is not Precision.INT8 or layer.operator not in _OPERATORS or layer.weight is None:
            continue
        form = quantizers.weight_of(layer, precision, style)
        if form is not None and form[1] is not None and form[0] in _MOST and weights.own(layer.weight) is not None:
            found[layer.name] = (layer, form[1], _MOST[form[0]])
    return found
