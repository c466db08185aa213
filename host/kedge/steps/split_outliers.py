"""Outlier decomposition: computes the few channels that would stretch an activation's range separately, in float."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import numpy.typing as npt

from kedge.options import Option
from kedge.quantization import activation_statistics, equalization
from kedge.quantization.equalization import Joint, Reader, Weights
from kedge.step import Context, Step
from kedge_protocol.errors import ConfigError
from kedge_targets.numerics import Precision

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class SplitOutliersOptions:
    """Options of outlier decomposition."""

    channels: Annotated[int, Option("Largest number of outlier channels per activation.")] = 8
    spread: Annotated[float, Option("How many times larger than the other channels an outlier channel is.")] = 1.5
    widening: Annotated[
        bool, Option("Also split before layers that widen the activation, where the extra addition costs most.")
    ] = True
    samples: Annotated[int, Option("Largest number of calibration samples for observing activations.")] = 128


class SplitOutliers(Step[SplitOutliersOptions]):
    """Computes outlier channels separately in float (Dettmers et al., "LLM.int8()", NeurIPS 2022). If few channels of
    an activation are far larger than the rest, each layer that multiplies it becomes the sum of two: one over these
    channels, in float, and one over the rest, whose range is then small. In float the graph computes the same."""

    name: ClassVar[str] = "split-outliers"
    Options = SplitOutliersOptions

    def apply(self, model: onnx.ModelProto, context: Context) -> onnx.ModelProto:
        """See :class:`kedge.step.Step`.

        Raises:
            ConfigError: options without a meaning.
            StepError: the graph does not run on a sample.
        """
        import onnx

        options = self.options
        for wrong, name, remedy in (
            (options.channels < 1, "channels", "Give 1 or more"),
            (options.spread < 1, "spread", "Give 1 or more; 1.5 to 3 are usual"),
            (options.samples < 1, "samples", "Give 1 or more"),
        ):
            if wrong:
                raise ConfigError(f"{name} = {getattr(options, name)!r} has no meaning", where=self.name, remedy=remedy)
        made = onnx.ModelProto()
        made.CopyFrom(model)
        weights = Weights(made)
        found = [
            joint
            for joint in equalization.joints(made, weights)
            if all(map(_mixing, joint.readers)) and (options.widening or not _widens(joint, weights))
        ]
        seen: dict[str, Array] = {}
        if found:
            watched = {joint.activation: joint.axis for joint in found}
            seen = activation_statistics.largest_magnitudes(
                made, watched, context, limit=options.samples, where=self.name
            )
        split = channels = 0
        for joint in found:
            outliers = self._outliers(seen[joint.activation])
            if outliers.size:
                context.layers.update(_split(made, joint, outliers, weights))
                split, channels = split + 1, channels + outliers.size
        said = f"{channels} channels of {split} activations are computed apart, in float"
        context.notes.append(f"{self.name}: {said if split else 'no channel is an outlier'}")
        context.figures |= {f"{self.name}.activations": split, f"{self.name}.channels": channels}
        return made

    def _outliers(self, sizes: Array) -> Array:
        """The channels (int64, ascending) that stand out from the rest."""
        order = np.argsort(-sizes, kind="stable")
        if len(order) <= self.options.channels:
            return np.zeros(0, np.int64)
        first = order[: self.options.channels]
        rest = sizes[order[self.options.channels]]
        return np.sort(first[sizes[first] > self.options.spread * rest]).astype(np.int64)


def _mixing(reader: Reader) -> bool:
    """Whether each channel of the answer comes from all that it reads: not so in a depthwise convolution."""
    return reader.layer.operator != "Conv" or reader.axis == 1


def _widens(joint: Joint, weights: Weights) -> bool:
    """Whether the layers that read it give more channels together than it has."""
    given = 0
    for reader in joint.readers:
        value = weights.own(reader.weight)
        if value is not None:
            given += value.shape[0 if reader.layer.operator == "Conv" else 1 - reader.axis]
    return given > joint.channels


def _split(model: onnx.ModelProto, joint: Joint, outliers: Array, weights: Weights) -> dict[str, Precision]:
    """Compute these channels apart, in place; the nodes that are to stay in float."""
    from onnx import helper

    activation = joint.activation
    rank = next(len(value.shape) for reader in joint.readers if (value := weights.own(reader.weight)) is not None)
    mask = np.ones(joint.channels, np.float32)
    mask[outliers] = 0
    if joint.axis == 1:
        mask = mask.reshape(-1, *[1] * (rank - 2))
    rest, picked = f"{activation}_without_outliers", f"{activation}_outliers"
    before = [
        helper.make_node("Mul", [activation, weights.add(f"{rest}_mask", mask)], [rest], name=rest),
        helper.make_node(
            "Gather", [activation, weights.add(f"{picked}_at", outliers)], [picked], name=picked, axis=joint.axis
        ),
    ]
    floating = [rest, picked]  # and with them what makes the activation
    nodes = {node.name: node for node in model.graph.node}
    behind: dict[str, list[onnx.NodeProto]] = {}
    for reader in joint.readers:
        node = nodes[reader.layer.name]
        behind[node.name] = _beside(node, reader, picked, rest, outliers, weights)
        floating += [made.name for made in behind[node.name] if made.op_type != "Add" or node.op_type != "Conv"]
    ordered: list[onnx.NodeProto] = []
    for node in list(model.graph.node):
        if node.name in behind and before:
            ordered += before
            before = []
        ordered += [node, *behind.get(node.name, [])]
    del model.graph.node[:]
    model.graph.node.extend(ordered)
    return dict.fromkeys(floating, Precision.FLOAT32)


def _beside(
    node: onnx.NodeProto, reader: Reader, picked: str, rest: str, outliers: Array, weights: Weights
) -> list[onnx.NodeProto]:
    """The node's own layer made that of the rest; the nodes that compute the outliers and add both."""
    from onnx import helper

    value = weights.own(reader.weight)
    if value is None:
        return []
    apart = np.take(value, outliers, axis=reader.axis)
    kept = value.copy()
    np.moveaxis(kept, reader.axis, 0)[outliers] = 0
    weights.replace(reader.weight, kept)
    name, answer = f"{node.name}_outliers", node.output[0]
    inputs = list(node.input)
    inputs[0] = rest
    del node.input[:]
    node.input.extend(inputs)
    node.output[0] = f"{answer}_rest"
    side = helper.make_node(node.op_type, [picked, weights.add(f"{reader.weight}_outliers", apart)], [name], name=name)
    side.attribute.extend(node.attribute)
    added = helper.make_node("Add", [node.output[0], name], [answer], name=f"{node.name}_with_outliers")
    return [side, added]
