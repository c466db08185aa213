"""Writes a graph's nodes anew, with pairs of QuantizeLinear and DequantizeLinear in place of tensors of integers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge_targets.graph import dead_code, nodes
from kedge_targets.graph.names import Names
from kedge_targets.graph.wiring import Wiring

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Scale:
    """The tensors of a scale and of a zero-point, which may be missing."""

    step: str
    zero: str = ""


class PairWriting:
    """The nodes that are written so far, and what the integers in them stand for.

    Attributes:
        wiring: of the graph as it was.
        floats: tensor of integers → tensor of the numbers that they stand for.
        scales: tensor of integers → how they are read back; none for those rounded by the range of each call.
        by_channel: whether a scale lies along an axis, which needs opset 13.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.wiring = Wiring(model)
        self.floats: dict[str, str] = {}
        self.scales: dict[str, Scale] = {}
        self.by_channel = False
        self._model = model
        self._names = Names(model)
        self._new: list[onnx.NodeProto] = []
        self._made = {tensor.name for tensor in model.graph.initializer} | {one.name for one in model.graph.input}
        self._stored: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def finish(self) -> None:
        """Put the new nodes into the model."""
        for value in self._model.graph.output:
            self.require(value.name)
        del self._model.graph.node[:]
        self._model.graph.node.extend(self._new)
        dead_code.remove_dead_nodes(self._model)
        nodes.name_nodes(self._model)

    def add(self, node: onnx.NodeProto) -> None:
        """Write a node as it is."""
        self._new.append(node)
        self._made |= set(node.output)

    def node(
        self,
        operator: str,
        given: Iterable[str],
        answers: Iterable[str],
        *,
        name: str,
        attributes: Iterable[onnx.AttributeProto] = (),
        domain: str = "",
        **more: Any,
    ) -> None:
        """Write a new node."""
        from onnx import helper

        made = helper.make_node(operator, list(given), list(answers), name=name, domain=domain, **more)
        made.attribute.extend(attributes)
        self.add(made)

    def fresh(self, base: str) -> str:
        """Return an unused tensor name."""
        return self._names.fresh(base)

    def constant(self, value: Array, base: str = "kedge_scale") -> str:
        """Store a constant; equal ones once."""
        from onnx import numpy_helper

        key = (str(value.dtype), value.shape, value.tobytes())
        if key not in self._stored:
            self._stored[key] = self._names.fresh(base)
            self._model.graph.initializer.append(numpy_helper.from_array(value, self._stored[key]))
        return self._stored[key]

    def read_back(self, tensor: str, scale: Scale | None) -> str:
        """Return the numbers that integers stand for, read back once."""
        if tensor in self.floats or scale is None:
            return self.floats[tensor]
        answer = self.fresh(f"{tensor}_float")
        self.node("DequantizeLinear", [tensor, *self._plain(scale)], [answer], name=f"{tensor}_read_back")
        self.floats[tensor] = answer
        return answer

    def round(self, tensor: str, answer: str, scale: Scale) -> None:
        """Round numbers to integers."""
        self.node("QuantizeLinear", [tensor, *self._plain(scale)], [answer], name=f"{answer}_rounded")
        self.scales[answer] = scale

    def require(self, tensor: str) -> None:
        """Write the integers of a tensor of which only the numbers are there."""
        if tensor not in self._made and tensor in self.floats and tensor in self.scales:
            self.round(self.floats[tensor], tensor, self.scales[tensor])

    def weight(self, tensor: str, step: Array | None, zero: Array | None, axis: int | None) -> str | None:
        """Read a constant back, with one scale or one for each place along the axis; None where that does not fit."""
        value = self.wiring.constant(tensor)
        if value is None or step is None or zero is None:
            return None
        many = max(step.size, zero.size)
        if many > 1:
            axis = None if axis is None or value.ndim < -axis else axis % value.ndim
            if axis is None or value.shape[axis] != many:
                return None
            self.by_channel = True
        where = () if many == 1 else (many,)
        step, zero = (np.array(np.broadcast_to(one.reshape(-1), many)).reshape(where) for one in (step, zero))
        names = [tensor, self.constant(step)]
        if value.dtype != np.int32:
            names.append(self.constant(zero.astype(value.dtype)))
        answer = self.fresh(f"{tensor}_float")
        along: dict[str, Any] = {} if many == 1 else {"axis": axis}
        self.node("DequantizeLinear", names, [answer], name=answer, **along)
        return answer

    def bias(self, tensor: str, given: str, weight: str, alpha: float = 1.0) -> str | None:
        """Read a bias of 32 bits back; its scale is that of the products."""
        first, second = self.wiring.constant(given), self.wiring.constant(weight)
        if first is None or second is None:
            return None
        step = np.asarray(first.reshape(-1) * second.reshape(-1) * second.dtype.type(alpha), second.dtype)
        return self.weight(tensor, step, np.zeros(1), 0)

    def zero(self, tensor: str) -> Array | None:
        """Return a zero-point, 0 where there is none; None where it is not constant."""
        return self.wiring.constant(tensor) if tensor else np.zeros(1)

    def same(self, one: Scale | None, other: Scale | None) -> bool:
        """Return whether integers are read back in the same way."""
        if one is None or other is None or one == other:
            return one == other
        return self.single(one.step) and self.single(other.step) and self.numbers(one) == self.numbers(other)

    def single(self, tensor: str) -> bool:
        """Return whether a tensor is a constant of one number."""
        value = self.wiring.constant(tensor) if tensor else None
        return value is not None and value.size == 1

    def numbers(self, scale: Scale) -> tuple[float, float]:
        """Return a scale and a zero-point."""
        step = self.wiring.constant(scale.step)
        zero = self.wiring.constant(scale.zero) if scale.zero else None
        return float(np.asarray(step).reshape(-1)[0]), 0.0 if zero is None else float(zero.reshape(-1)[0])

    def _plain(self, scale: Scale) -> list[str]:
        """Return a scale and a zero-point without axes: [1] is one number for ONNX Runtime alone."""
        values = [self.wiring.constant(name) for name in (scale.step, scale.zero) if name]
        return [self.constant(np.asarray(value).reshape(())) for value in values]
