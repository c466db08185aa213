"""Rounds the weights of integer layers so that their errors compensate each other."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import numpy.typing as npt

from kedge.options import Option
from kedge.quantization import equalization
from kedge.step import Context, Step
from kedge.steps.limited_samples import LimitedSamples
from kedge_protocol import files
from kedge_protocol.errors import ConfigError
from kedge_targets.graph import gptq, quantizers
from kedge_targets.graph.layers import layers
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
        known = _Memo(context.memo)
        left = [name for name, one in chosen.items() if known.get(one) is None]
        found = gptq.products(
            made,
            LimitedSamples(context, self.options.samples),
            dict.fromkeys(left, Precision.INT8),
            fits=lambda precision: precision is Precision.INT8,
        )
        gains = []
        for name, one in chosen.items():
            if name in found:
                known.put(one, *gptq.round_to_integers(one.value, found.pop(name), axis=one.axis, most=one.most))
            if (rounded := known.get(one)) is not None:
                weights.replace(one.weight, rounded[0])
                gains.append(rounded[1])
        typical = float(np.median(gains)) if gains else 0.0
        said = "the plan rounds no weights with a scale for each channel"
        if gains:
            said = f"{len(gains)} layers, the error of their outputs is {typical:.1f} dB lower in the median"
        context.notes.append(f"{self.name}: {said}")
        context.figures |= {"compensate-rounding.layers": len(gains), "compensate-rounding.gain_db": typical}
        return made


@dataclass(frozen=True, kw_only=True)
class _Rounded:
    """A layer whose weight is rounded.

    Attributes:
        weight: name of the tensor, and its ``value``.
        axis: of the scales.
        most: the largest integer.
    """

    weight: str
    value: Array
    axis: int
    most: int


class _Memo:
    """Rounded weights with their gains in dB, kept in a folder for other plans: what a layer is rounded to depends on
    what its inputs are in float, and not on what the plan makes of the layers before it."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._here: dict[str, tuple[Array, float]] = {}

    def get(self, one: _Rounded) -> tuple[Array, float] | None:
        """Return the rounded weight and its gain; None if it was not rounded yet."""
        key = _key(one)
        file = None if self._folder is None else self._folder / f"{key}.npz"
        if key not in self._here and file is not None and file.is_file():
            with np.load(file) as stored:
                self._here[key] = stored["weight"], float(stored["gain"])
        return self._here.get(key)

    def put(self, one: _Rounded, weight: Array, gain: float) -> None:
        """Keep what a weight was rounded to."""
        key = _key(one)
        self._here[key] = weight, gain
        if self._folder is not None:
            content = io.BytesIO()
            np.savez(content, weight=weight, gain=gain)
            files.write(self._folder / f"{key}.npz", content.getvalue())


def _key(one: _Rounded) -> str:
    return hashlib.sha256(repr((one.weight, one.axis, one.most)).encode() + one.value.tobytes()).hexdigest()[:32]


def _chosen(model: onnx.ModelProto, weights: equalization.Weights, context: Context) -> dict[str, _Rounded]:
    """Return the layers to round, by name."""
    style = quantizers.style_of(context.plan)
    found = {}
    for layer in layers(model, weights.wiring):
        precision = quantizers.precision_of(layer.name, context.plan)
        if precision is not Precision.INT8 or layer.operator not in _OPERATORS or layer.weight is None:
            continue
        form = quantizers.weight_of(layer, precision, style)
        value = weights.own(layer.weight)
        if form is not None and form[1] is not None and form[0] in _MOST and value is not None:
            found[layer.name] = _Rounded(weight=layer.weight, value=value, axis=form[1], most=_MOST[form[0]])
    return found
