"""Equalization: balances channels of different ranges between layers, so that one scale serves all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import numpy.typing as npt

from kedge.options import Option
from kedge.quantization import activation_statistics, equalization
from kedge.quantization.equalization import Joint, Weights
from kedge.step import Context, Step
from kedge_protocol.errors import ConfigError
from kedge_targets.numerics import Precision

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]

_SETTLED = 1e-3
_FLOOR = 1e-3
"""Of the largest channel: a channel below it is treated as one of this size, or left alone where weights are evened
out: training leaves channels with weights of 1e-30 behind, which only their bias moves."""
_GROWTH = 4.0
"""Times by which the largest channel of an activation may grow against the mean of all."""


@dataclass(frozen=True, kw_only=True)
class EqualizeOptions:
    """Options of equalization."""

    weights: Annotated[bool, Option("Equalize the weights of consecutive layers.")] = True
    activations: Annotated[bool, Option("Move activation outliers into the weights of the next layer.")] = True
    strength: Annotated[float, Option("Share of an activation's spread that moves into the weights, 0 to 1.")] = 0.7
    spread: Annotated[
        float, Option("Ratio of the largest to the median channel from which an activation is equalized.")
    ] = 3.0
    multiply: Annotated[bool, Option("Insert a multiplication where no preceding layer can absorb the factors.")] = True
    rounds: Annotated[int, Option("Largest number of passes over the weights.")] = 20
    samples: Annotated[int, Option("Largest number of calibration samples for observing activations.")] = 128


class Equalize(Step[EqualizeOptions]):
    """Equalizes weight ranges across layers (Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
    Correction", ICCV 2019) and moves activation outliers into weights (Xiao et al., "SmoothQuant", ICML 2023). In float
    the graph computes the same."""

    name: ClassVar[str] = "equalize"
    Options = EqualizeOptions

    def apply(self, model: onnx.ModelProto, context: Context) -> onnx.ModelProto:
        """See :class:`kedge.step.Step`. BatchNormalization behind convolutions is folded first.

        Raises:
            ConfigError: a strength outside of 0 to 1, or other options without a meaning.
            StepError: the graph does not run on a sample.
        """
        import onnx

        _check(self.options)
        made = onnx.ModelProto()
        made.CopyFrom(model)
        folded = equalization.fold_batch_normalization(made)
        evened = self._even_weights(made, context) if self.options.weights else 0
        moved, added = self._move_outliers(made, context) if self.options.activations else (0, 0)
        parts = [
            f"{folded} batch normalizations folded" if folded else "",
            f"weights evened out at {evened} joints" if evened else "",
            f"outliers of {moved} activations moved into weights" if moved else "",
            f"{added} multiplications added" if added else "",
        ]
        context.notes.append("equalize: " + (", ".join(filter(None, parts)) or "nothing to even out"))
        context.figures |= {"equalize.joints": evened, "equalize.activations": moved, "equalize.multiplications": added}
        return made

    def _even_weights(self, model: onnx.ModelProto, context: Context) -> int:
        """How many joints were treated. One whose activation would become harder to round stays as it was."""
        weights = Weights(model)
        pairs = [joint for joint in equalization.joints(model, weights) if joint.first is not None]
        if not pairs:
            return 0
        watched = {joint.activation: joint.axis for joint in pairs}
        seen = activation_statistics.largest_magnitudes(
            model, watched, context, limit=self.options.samples, where=self.name
        )
        factors = {joint.activation: np.ones(joint.channels) for joint in pairs}
        for _ in range(self.options.rounds):
            furthest = 0.0
            for joint in pairs:
                moved = _factors(joint, weights)
                _scale(joint, weights, moved)
                factors[joint.activation] *= moved
                furthest = max(furthest, float(np.abs(moved - 1).max()))
            if furthest < _SETTLED:
                break
        undone = 0
        for joint in pairs:
            sizes, moved = seen[joint.activation].astype(np.float64), factors[joint.activation]
            if _outlier(sizes / moved) > max(_GROWTH * _outlier(sizes), self.options.spread):
                _scale(joint, weights, 1 / moved)
                undone += 1
        return len(pairs) - undone

    def _move_outliers(self, model: onnx.ModelProto, context: Context) -> tuple[int, int]:
        """How many activations were treated, and how many multiplications added."""
        weights = Weights(model)
        # Those that stay in float have no use for it.
        found = [
            joint
            for joint in equalization.joints(model, weights)
            if any(context.plan.layers.get(one.layer.name) is not Precision.FLOAT32 for one in joint.readers)
        ]
        if not found:
            return 0, 0
        watched = {joint.activation: joint.axis for joint in found}
        seen = activation_statistics.largest_magnitudes(
            model, watched, context, limit=self.options.samples, where=self.name
        )
        moved = added = 0
        for joint in found:
            sizes = seen[joint.activation]
            median = float(np.median(sizes))
            if not joint.absorbing and not self.options.multiply:
                continue
            if float(sizes.max()) < self.options.spread * median or not sizes.any():
                continue
            behind = _behind(joint, weights)
            factors = _balanced(sizes, behind, self.options.strength)
            moved += 1
            for reader in joint.readers:
                weights.multiply(reader.weight, reader.axis, factors)
            for name, axis in joint.absorbing:
                weights.multiply(name, axis, 1 / factors)
            if not joint.absorbing:
                _multiply(model, joint, weights, factors)
                added += 1
        return moved, added


def _check(options: EqualizeOptions) -> None:
    for wrong, name, remedy in (
        (not 0 <= options.strength <= 1, "strength", "Give a number from 0 to 1; 0.5 to 0.8 are usual"),
        (options.spread < 1, "spread", "Give 1 to treat every activation, more for outliers only"),
        (options.rounds < 1, "rounds", "Give 1 or more"),
        (options.samples < 1, "samples", "Give 1 or more"),
    ):
        if wrong:
            raise ConfigError(f"{name} = {getattr(options, name)!r} has no meaning", where="equalize", remedy=remedy)


def _behind(joint: Joint, weights: Weights) -> Array:
    """The largest weight of each channel in the layers that read it."""
    values = [(weights.own(reader.weight), reader.axis) for reader in joint.readers]
    largest: Array = np.max(
        [equalization.ranges_along(value, axis) for value, axis in values if value is not None], axis=0
    )
    return largest


def _factors(joint: Joint, weights: Weights) -> Array:
    """What gives the weights before and behind a joint the same range in each channel."""
    factors = np.ones(joint.channels)
    value = None if joint.first is None else weights.own(joint.first[0])
    if joint.first is None or value is None:
        return factors
    before, behind = equalization.ranges_along(value, joint.first[1]), _behind(joint, weights)
    alive = (before > _FLOOR * before.max()) & (behind > _FLOOR * behind.max())
    factors[alive] = np.sqrt(before[alive].astype(np.float64) / behind[alive])
    return factors


def _scale(joint: Joint, weights: Weights, factors: Array) -> None:
    """Divide before a joint, multiply behind it."""
    for name, axis in joint.absorbing:
        weights.multiply(name, axis, 1 / factors)
    for reader in joint.readers:
        weights.multiply(reader.weight, reader.axis, factors)


def _outlier(sizes: Array) -> float:
    """The largest of the channels' sizes against their mean."""
    mean = float(sizes.mean())
    return float(sizes.max()) / mean if mean > 0 else 1.0


def _balanced(sizes: Array, behind: Array, strength: float) -> Array:
    """The factors that activations are divided by; their geometric mean is 1."""
    sizes = np.maximum(sizes, _FLOOR * sizes.max()).astype(np.float64)
    behind = np.maximum(behind, _FLOOR * max(float(behind.max()), 1e-30)).astype(np.float64)
    logs = strength * np.log(sizes) - (1 - strength) * np.log(behind)
    factors: Array = np.exp(logs - logs.mean()).astype(np.float32)
    return factors


def _multiply(model: onnx.ModelProto, joint: Joint, weights: Weights, factors: Array) -> None:
    from onnx import helper

    inverse = (1 / factors).astype(np.float32)
    readers = {reader.layer.name for reader in joint.readers}
    operators = {reader.layer.operator for reader in joint.readers}
    if operators == {"Conv"}:
        rank = next(len(value.shape) for reader in joint.readers if (value := weights.own(reader.weight)) is not None)
        shape = [1] * rank
        shape[1] = inverse.size
        inverse = inverse.reshape(shape)
    constant = weights.add(f"{joint.activation}_evened_by", inverse)
    output = f"{joint.activation}_evened"
    node = helper.make_node("Mul", [joint.activation, constant], [output], name=output)
    first = next(index for index, one in enumerate(model.graph.node) if one.name in readers)
    for one in model.graph.node:
        if one.name in readers:
            for index, name in enumerate(one.input):
                if name == joint.activation:
                    one.input[index] = output
    model.graph.node.insert(first, node)
