"""Finds where a factor for each channel can move from one layer into the next without changing the graph's outputs.

If only operators that preserve positive factors lie between a layer and its readers, channel i may be divided by s in
the first and multiplied by s in the others. Rounded to few levels the two forms differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge_targets.graph import dead_code
from kedge_targets.graph.layers import Layer, layers
from kedge_targets.graph.wiring import Wiring

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]

_POINTWISE = frozenset({"Relu", "LeakyRelu", "Identity", "Dropout"})
_POOLING = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"})
_FLATTENING = frozenset({"Flatten", "Reshape", "Squeeze"})
_GLOBAL = frozenset({"GlobalAveragePool", "GlobalMaxPool"})


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A layer and the axis of its weight that belongs to the channels of its input."""

    layer: Layer
    weight: str
    axis: int


@dataclass(frozen=True, kw_only=True)
class Joint:
    """An activation that feeds layers with weights.

    Attributes:
        activation: its name.
        channels: number of channels.
        axis: axis of the activation along which its channels lie.
        readers: the layers that multiply it by their weights.
        absorbing: initializers before it that take the factor, with the axis of the channels; empty if a multiplication
            must be inserted.
        first: the weight among these; None if there is none.
    """

    activation: str
    channels: int
    axis: int
    readers: tuple[Reader, ...]
    absorbing: tuple[tuple[str, int], ...] = ()
    first: tuple[str, int] | None = None


class Weights:
    """A graph's initializers, to be read and replaced in place. Those read by more than one node are not touched."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self.wiring = Wiring(model)

    def own(self, name: str) -> Array | None:
        """Return a float32 initializer that only one node reads, else None."""
        from onnx import numpy_helper

        tensor = self._tensors.get(name)
        if tensor is None or len(self.wiring.readers[name]) != 1 or name in self.wiring.outputs:
            return None
        value = np.asarray(numpy_helper.to_array(tensor))
        return value if value.dtype == np.float32 else None

    def replace(self, name: str, value: Array) -> None:
        """Replace an initializer by values of the same shape."""
        from onnx import numpy_helper

        self._tensors[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value, dtype=np.float32), name))

    def multiply(self, name: str, axis: int, factors: Array) -> None:
        """Multiply an initializer by factors along an axis."""
        value = self.own(name)
        if value is not None:
            self.replace(name, value * _along(factors, axis, value.ndim))

    def add(self, base: str, value: Array) -> str:
        """Add an initializer; return its name."""
        from onnx import numpy_helper

        name, count = base, 1
        while name in self._tensors or name in self.wiring.maker:
            count += 1
            name = f"{base}_{count}"
        tensor = numpy_helper.from_array(np.ascontiguousarray(value), name)
        self._model.graph.initializer.append(tensor)
        self._tensors[name] = self._model.graph.initializer[-1]
        return name


def ranges_along(value: Array, axis: int) -> Array:
    """Return the largest magnitude in each channel."""
    return np.asarray(np.abs(np.moveaxis(value, axis, 0).reshape(value.shape[axis], -1)).max(axis=1))


def joints(model: onnx.ModelProto, weights: Weights) -> Iterator[Joint]:
    """Yield every activation that a layer multiplies by its own weight, in the graph's order, except those made by
    setting channels to 0 (:mod:`kedge.steps.split_outliers`), which are already handled."""
    by_name = {node.name: node for node in model.graph.node}
    groups: dict[str, list[Reader]] = {}
    for layer in layers(model, weights.wiring):
        reader = _reader(layer, by_name[layer.name], weights)
        if reader is not None:
            groups.setdefault(layer.activations[0], []).append(reader)
    for activation, readers in groups.items():
        sizes = {_size(reader, weights) for reader in readers}
        ways = {_channel_axis(reader) for reader in readers}
        if len(sizes) != 1 or len(ways) != 1 or _masked(activation, weights):
            continue
        channels, axis = sizes.pop(), ways.pop()
        joint = Joint(activation=activation, channels=channels, axis=axis, readers=tuple(readers))
        only = len(weights.wiring.readers[activation]) == len(readers) and activation not in weights.wiring.outputs
        found = _absorbing(activation, joint, weights) if only else None
        if found is None:
            yield joint
        else:
            yield Joint(
                activation=activation, channels=channels, axis=axis, readers=tuple(readers), absorbing=found[0],
                first=found[1],
            )  # fmt: skip


def fold_batch_normalization(model: onnx.ModelProto) -> int:
    """Fold each BatchNormalization after a convolution into its weights, in place; return how many there were."""
    weights = Weights(model)
    folded: list[onnx.NodeProto] = []
    for node in model.graph.node:
        maker = weights.wiring.maker.get(node.input[0]) if node.op_type == "BatchNormalization" else None
        if maker is None or maker.op_type != "Conv" or len(weights.wiring.readers[node.input[0]]) != 1:
            continue
        if node.input[0] in weights.wiring.outputs or len([name for name in node.output if name]) > 1:
            continue
        numbers = [weights.wiring.constant(name) for name in node.input[1:5]]
        kernel = weights.own(maker.input[1])
        has_bias = len(maker.input) > 2 and bool(maker.input[2])
        bias = weights.own(maker.input[2]) if has_bias else None
        if kernel is None or any(number is None for number in numbers) or (has_bias and bias is None):
            continue
        scale, shift, mean, variance = (np.asarray(number, np.float64) for number in numbers)
        epsilon = next((attribute.f for attribute in node.attribute if attribute.name == "epsilon"), 1e-5)
        factor = scale / np.sqrt(variance + epsilon)
        weights.replace(maker.input[1], kernel * _along(factor, 0, kernel.ndim))
        moved = ((0.0 if bias is None else bias) - mean) * factor + shift
        if bias is None:
            name = weights.add(f"{maker.name}_bias", moved.astype(np.float32))
            del maker.input[2:]
            maker.input.append(name)
        else:
            weights.replace(maker.input[2], moved)
        maker.output[0] = node.output[0]
        folded.append(node)
    for node in folded:
        model.graph.node.remove(node)
    if folded:
        dead_code.remove_dead_nodes(model)
    return len(folded)


def _reader(layer: Layer, node: onnx.NodeProto, weights: Weights) -> Reader | None:
    value = weights.own(layer.weight) if layer.weight is not None else None
    if layer.weight is None or value is None or len(layer.activations) != 1:
        return None
    if layer.operator == "Conv":
        groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
        if groups == 1:
            return Reader(layer=layer, weight=layer.weight, axis=1)
        depthwise = value.shape[0] == groups and value.shape[1] == 1
        return Reader(layer=layer, weight=layer.weight, axis=0) if depthwise else None
    if layer.operator == "Gemm":
        turned = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
        return None if turned or layer.axis is None else Reader(layer=layer, weight=layer.weight, axis=1 - layer.axis)
    if layer.operator == "MatMul" and layer.weight_input == 1 and value.ndim == 2:
        return Reader(layer=layer, weight=layer.weight, axis=0)
    return None


def _size(reader: Reader, weights: Weights) -> int:
    value = weights.own(reader.weight)
    return 0 if value is None else int(value.shape[reader.axis])


def _channel_axis(reader: Reader) -> int:
    return 1 if reader.layer.operator == "Conv" else -1


def _masked(activation: str, weights: Weights) -> bool:
    node = weights.wiring.maker.get(activation)
    if node is None or node.op_type != "Mul":
        return False
    constants = [value for name in node.input if (value := weights.wiring.constant(name)) is not None]
    return any(value.size > 1 and not value.all() for value in constants)


def _absorbing(
    activation: str, joint: Joint, weights: Weights
) -> tuple[tuple[tuple[str, int], ...], tuple[str, int] | None] | None:
    """Return the initializers that can take a factor of the activation's channels, and the weight among them."""
    taken: list[tuple[str, int]] = []
    spatial = joint.axis == 1
    flattened = False
    tensor = activation
    while (node := weights.wiring.maker.get(tensor)) is not None:
        if tensor != activation and (len(weights.wiring.readers[tensor]) != 1 or tensor in weights.wiring.outputs):
            return None
        operator = node.op_type
        if operator in _FLATTENING and not spatial:
            flattened = True
        elif flattened and operator in _GLOBAL:
            # One number a channel: flat they are the channels still.
            spatial, flattened = True, False
        elif flattened and operator not in _POINTWISE:
            return None
        elif operator == "Add" and not spatial and (vector := _vector(node, joint.channels, weights)) is not None:
            taken.append((node.input[vector], -1))
            tensor = node.input[1 - vector]
            continue
        elif operator not in _POINTWISE and not (operator in _POOLING and spatial):
            return _ended(node, joint.channels, taken, spatial, weights)
        tensor = node.input[0]
    return None


def _ended(
    node: onnx.NodeProto, channels: int, taken: list[tuple[str, int]], spatial: bool, weights: Weights
) -> tuple[tuple[tuple[str, int], ...], tuple[str, int] | None] | None:
    if node.op_type == "LayerNormalization" and not spatial:
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), -1)
        taken += [(name, -1) for name in node.input[1:] if name]
        first = None
        if axis != -1:
            return None
    elif node.op_type == "Conv" and spatial and not taken:
        first = (node.input[1], 0)
        taken += [(name, 0) for name in node.input[1:] if name]
    elif node.op_type == "Gemm" and not spatial:
        turned = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        first = (node.input[1], 0 if turned else 1)
        taken += [first, *((name, -1) for name in node.input[2:] if name)]
    elif node.op_type == "MatMul" and not spatial:
        first = (node.input[1], -1)
        taken.append(first)
    elif node.op_type == "Mul" and not spatial and (vector := _vector(node, channels, weights)) is not None:
        first = None
        taken.append((node.input[vector], -1))
    else:
        return None
    for name, axis in taken:
        value = weights.own(name)
        if value is None or value.shape[axis] != channels:
            return None
    return tuple(taken), first


def _vector(node: onnx.NodeProto, channels: int, weights: Weights) -> int | None:
    """Return the index of an input that holds one number for each channel of the last axis."""
    for index, name in enumerate(node.input):
        value = weights.own(name)
        if value is not None and value.size == channels == value.shape[-1]:
            return index
    return None


def _along(factors: Array, axis: int, axes: int) -> Array:
    shape = [1] * axes
    shape[axis] = factors.size
    return factors.reshape(shape)
