"""The context in which an operation is made: a node, the graph's constants, what is known about its inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from kedge_protocol.errors import VerificationError
from kedge_targets.backends.finn import bit_packing
from kedge_targets.backends.finn.graph_file import Graph, Node
from kedge_targets.backends.finn.values import EXACT32, EXACT64, Space, Value

Array = npt.NDArray[Any]
Operation = Callable[[Space], None]
"""Adds the steps of one node for a batch."""

_REMEDY = "Compile the model again, with this version's compiler"


class Context:
    """One node that becomes an operation. What an operation needs only once is computed here, when a model is loaded.

    Args:
        graph: graph that contains the node.
        node: the node.
        values: what is known about all activations so far; the node's outputs are added.
    """

    def __init__(self, graph: Graph, node: Node, values: dict[str, Value]) -> None:
        self.node = node
        self.attributes = node.attributes
        self._graph = graph
        self._values = values

    @property
    def output(self) -> str:
        """Return the first output's name."""
        return self.node.outputs[0]

    def value(self, index: int = 0) -> Value:
        """Return what is known about an input that must be an activation."""
        name = self.node.inputs[index] if index < len(self.node.inputs) else ""
        if name not in self._values:
            self.refuse(f"its input {index} is {'missing' if not name else 'a constant'}")
        return self._values[name]

    def is_constant(self, index: int) -> bool:
        """Return whether an input is a constant."""
        return index < len(self.node.inputs) and self.node.inputs[index] in self._graph.constants

    def constant(self, index: int) -> Array:
        """Return an input that must be a constant."""
        if not self.is_constant(index):
            self.refuse(f"its input {index} must be a constant and is computed")
        return self._graph.constants[self.node.inputs[index]]

    def whole_constant(self, index: int) -> Array:
        """Return an input that must be a constant of integers, as int64."""
        constant = self.constant(index)
        if not bit_packing.integral(constant):
            self.refuse(f"its constant {self.node.inputs[index]!r} has numbers that are no integers")
        return constant.astype(np.int64)

    def sample_shape(self, output: int = 0) -> tuple[int, ...]:
        """Return the shape of one sample of an output."""
        return self._graph.tensors[self.node.outputs[output]].shape[1:]

    def made(self, value: Value, output: int = 0) -> None:
        """Record what is known about an output.

        Raises:
            VerificationError: its shape differs from the graph's.
        """
        if value.shape != self.sample_shape(output):
            self.refuse(f"it gives the shape {value.shape}, the graph says {self.sample_shape(output)}")
        self._values[self.node.outputs[output]] = value

    def same(self, index: int = 0, **changes: Any) -> Value:
        """Return what is known about an output that holds the numbers of an input."""
        return replace(self.value(index), shape=self.sample_shape(), **changes)

    def carrier(self, largest: float) -> np.dtype[Any]:
        """Return the dtype in which sums of integers are exact as long as none exceeds ``largest``."""
        if largest >= EXACT64:
            self.refuse(f"its sums may reach {largest:.3g}, beyond the integers that 53 bits hold")
        return np.dtype(np.float32 if largest < EXACT32 else np.float64)

    def integers(self, index: int = 0) -> Value:
        """Return an activation that must have integer values."""
        value = self.value(index)
        if not value.integer or not np.isfinite([value.low, value.high]).all():
            self.refuse(
                f"its input {self.node.inputs[index]!r} is not of integers, so its sums would depend on their order",
                remedy="Quantize what goes into this layer",
            )
        return value

    def ints(self, name: str, default: list[int] | None = None) -> list[int]:
        """Return an attribute that is a list of integers."""
        value = self.attributes.get(name, default)
        if not isinstance(value, list) or not all(isinstance(item, int) for item in value):
            self.refuse(f"its attribute {name!r} is {value!r}, a list of integers was expected")
        return value

    def number(self, name: str, default: float) -> float:
        """Return an attribute that is a number."""
        value = self.attributes.get(name, default)
        if not isinstance(value, (int, float)):
            self.refuse(f"its attribute {name!r} is {value!r}, a number was expected")
        return value

    def refuse(self, what: str, *, remedy: str = _REMEDY) -> NoReturn:
        """Raise :class:`VerificationError` with the node's name."""
        raise VerificationError(what, where=f"{self.node.operator} {self.node.name!r}", remedy=remedy)


def plain(space: Space, name: str, value: Value) -> Array:
    """Return an input with its offset added, if there is one."""
    array = space[name]
    if value.offset is None:
        return array
    whole = space.scratch(array.shape, array.dtype)
    space.step(np.add, array, value.offset.astype(array.dtype), out=whole)
    return whole
