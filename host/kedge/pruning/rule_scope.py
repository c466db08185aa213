"""What the operators' rules read of a graph and record about it."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge.pruning.channel_ids import Axes, Ids, Tracker, none
from kedge.pruning.shapes import Length, Shapes

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]
Place = tuple[str, int]
"""A constant's name and one of its axes."""


class Scope:
    """A graph whose channels are being followed.

    Attributes:
        tracker: the numbers of the channels.
        shapes: the observed shapes.
        axes: tensor → what each axis carries.
        dims: shape vector → for each entry, what the axis carries whose length it holds.
        producing: axes of weights along which they make channels.
        consuming: axes of weights along which they read channels; zeros there disconnect a channel.
        scaling: axes of weights that scale single channels.
        heads: numbers along the batch axes of products of two activations, as attention heads are.
    """

    def __init__(self, model: onnx.ModelProto, shapes: Shapes) -> None:
        import onnx

        self.model = model
        self.shapes = shapes
        self.tracker = Tracker()
        self.axes: dict[str, Axes] = {}
        self.dims: dict[str, Axes] = {}
        self.producing: set[Place] = set()
        self.consuming: set[Place] = set()
        self.scaling: set[Place] = set()
        self.heads: list[Ids] = []
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in model.graph.node:
            for name in node.input:
                self.readers[name].append(node)
        real = (
            onnx.TensorProto.FLOAT,
            onnx.TensorProto.FLOAT16,
            onnx.TensorProto.BFLOAT16,
            onnx.TensorProto.DOUBLE,
        )
        for name, tensor in self.constants.items():
            ids = tensor.data_type in real
            self.axes[name] = tuple(self.tracker.fresh(dim) if ids and dim > 1 else None for dim in tensor.dims)

    def of(self, name: str) -> Axes:
        """Return what the axes of a tensor carry."""
        return self.axes[name] if name in self.axes else none(self.rank(name))

    def known(self, name: str) -> bool:
        """Return whether the tensor was observed."""
        return name in self.shapes.lengths

    def rank(self, name: str) -> int:
        return len(self.shapes.lengths.get(name, ()))

    def lengths(self, name: str) -> tuple[Length, ...]:
        return self.shapes.lengths[name]

    def constant(self, node: onnx.NodeProto, index: int) -> Array | None:
        """Return the value of a constant input; None if it is not constant or is omitted."""
        from onnx import numpy_helper

        if index >= len(node.input) or node.input[index] not in self.constants:
            return None
        value: Array = numpy_helper.to_array(self.constants[node.input[index]])
        return value

    def given(self, node: onnx.NodeProto, index: int) -> bool:
        """Return whether an optional input is given."""
        return index < len(node.input) and bool(node.input[index])

    def whole(self, name: str, axis: int) -> Ids | None:
        """Return what an axis carries if that is one number for each index; otherwise hold it and return None."""
        ids = self.of(name)[axis]
        if ids is None:
            return None
        if len(ids) != self.shapes.fixed(name, axis):
            self.tracker.hold(ids)
            return None
        return ids

    def hold(self, *names: str) -> None:
        """Mark all channels of these tensors as held."""
        for name in names:
            self.tracker.hold(*self.of(name), *self.dims.get(name, ()))


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """Return the value of an attribute."""
    import onnx

    for given in node.attribute:
        if given.name == name:
            return onnx.helper.get_attribute_value(given)
    return default


def integers(value: Array | None) -> list[int] | None:
    """Return a constant of indices as a list of plain integers."""
    return None if value is None else [int(number) for number in np.ravel(value)]
