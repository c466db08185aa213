"""Unrolls LSTM, GRU and RNN step by step: TFLite's own operators are bound to one layout and one quantization scheme,
plain operators are not. Formulas as in ONNX's operators of these names."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.errors import UnsupportedOperatorError
from kedge_targets.graph import dead_code
from kedge_targets.graph.wiring import Wiring

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[np.float32]

MOST_STEPS = 64
"""Longest sequence; longer ones would give a graph of thousands of nodes."""

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
_ACTIVATIONS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}


def unroll(model: onnx.ModelProto) -> None:
    """Replace each recurrent node by the operations of each step, in place. Shapes must have been inferred and fixed.

    Raises:
        UnsupportedOperatorError: a node cannot be unrolled; names it, with the reason.
    """
    if not any(node.op_type in _GATES for node in model.graph.node):
        return
    wiring = Wiring(model)
    made: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type in _GATES and node.domain in ("", "ai.onnx"):
            made += _Unrolled(model, node, wiring).nodes
        else:
            made.append(node)
    del model.graph.node[:]
    model.graph.node.extend(made)
    dead_code.remove_dead_nodes(model)


class _Unrolled:
    """One unrolled node.

    Attributes:
        nodes: nodes that replace it.
    """

    def __init__(self, model: onnx.ModelProto, node: onnx.NodeProto, wiring: Wiring) -> None:
        from onnx import helper

        self._model = model
        self._node = node
        self._wiring = wiring
        self._given: dict[str, Any] = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        self._hidden = int(self._given.get("hidden_size", 0))
        self._count = 0
        self._names: set[str] = set()
        self.nodes: list[onnx.NodeProto] = []
        self._steps, self._batch, self._width = self._shape()
        self._check()
        self._build()

    def _refused(self, reason: str) -> UnsupportedOperatorError:
        return UnsupportedOperatorError(
            f"the operator {self._node.op_type} cannot be unrolled: {reason}",
            where=f"node {self._node.name!r}",
            remedy="Export the model without that, or choose a target with another backend",
        )

    def _shape(self) -> tuple[int, int, int]:
        values = (*self._model.graph.input, *self._model.graph.value_info)
        dims = next((value.type.tensor_type.shape.dim for value in values if value.name == self._node.input[0]), ())
        sizes = [int(dim.dim_value) for dim in dims]
        if len(sizes) != 3 or min(sizes) < 1:
            raise self._refused(f"the shape of its input {self._node.input[0]!r} is not fixed")
        if sizes[0] > MOST_STEPS:
            raise self._refused(f"it takes {sizes[0]} steps, {MOST_STEPS} at most are unrolled")
        return sizes[0], sizes[1], sizes[2]

    def _check(self) -> None:
        kind, given = self._node.op_type, self._given
        activations = [one.decode() for one in given.get("activations", [])]
        if activations and activations != _ACTIVATIONS[kind] * (len(activations) // len(_ACTIVATIONS[kind])):
            raise self._refused(f"its activations are {', '.join(activations)}")
        for name in ("clip", "input_forget", "layout"):
            if given.get(name):
                raise self._refused(f"{name} is set")
        if kind == "LSTM" and self._tensor(7):
            raise self._refused("it has peepholes")
        lengths = self._wiring.constant(self._tensor(4)) if self._tensor(4) else np.array(self._steps)
        if lengths is None or (np.asarray(lengths) != self._steps).any():
            raise self._refused("its sequences are of several lengths")
        if any(self._wiring.constant(self._tensor(at)) is None for at in (1, 2, 3) if self._tensor(at)):
            raise self._refused("its weights are no constants")

    def _tensor(self, at: int) -> str:
        return str(self._node.input[at]) if len(self._node.input) > at else ""

    def _weights(self, at: int, direction: int, shape: tuple[int, ...]) -> Array:
        value = self._wiring.constant(self._tensor(at)) if self._tensor(at) else None
        return np.zeros(shape, np.float32) if value is None else np.asarray(value[direction], np.float32)

    def _build(self) -> None:
        flat = self._add("Reshape", [self._node.input[0], self._ints([self._steps * self._batch, self._width])])
        both = self._given.get("direction", b"forward").decode()
        ways = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}[both]
        found = [self._direction(flat, index, backwards) for index, backwards in enumerate(ways)]
        whole = [self._steps, 1, self._batch, self._hidden]
        last = [1, self._batch, self._hidden]
        for at, (axis, shape) in enumerate(((1, whole), (0, last), (0, last))):
            answer = self._node.output[at] if len(self._node.output) > at else ""
            if not answer:
                continue
            parts = [self._add("Reshape", [one[at], self._ints(shape)]) for one in found]
            self._add("Concat", parts, answer, axis=axis) if len(parts) > 1 else self._renamed(parts[0], answer)

    def _direction(self, flat: str, index: int, backwards: bool) -> tuple[str, str, str]:
        """Return all steps stacked, the last hidden state and the last cell."""
        gates, hidden, kind = _GATES[self._node.op_type], self._hidden, self._node.op_type
        weight = self._weights(1, index, (gates * hidden, self._width))
        again = self._weights(2, index, (gates * hidden, hidden))
        bias = self._weights(3, index, (2 * gates * hidden,)).reshape(2, gates * hidden).copy()
        apart = kind == "GRU"  # its last gate multiplies what comes of the state before it is added
        kept = bias[1, (gates - 1) * hidden :].copy() if apart else np.zeros(hidden, np.float32)
        if apart:
            bias[1, (gates - 1) * hidden :] = 0
        product = self._add("MatMul", [flat, self._floats(weight.T)])
        product = self._add("Add", [product, self._floats(bias.sum(axis=0))])
        rows = [product]
        if self._steps > 1:
            rows = self._split(product, [self._batch] * self._steps, axis=0)
        state, cell = self._start(5, index), self._start(6, index) if kind == "LSTM" else ""
        states = [""] * self._steps
        for step in reversed(range(self._steps)) if backwards else range(self._steps):
            if kind == "LSTM":
                state, cell = self._lstm(rows[step], state, cell, again)
            elif kind == "GRU":
                state = self._gru(rows[step], state, again, kept)
            else:
                state = self._add("Tanh", [self._with_state(rows[step], state, again)])
            states[step] = state
        whole = self._add("Concat", states, axis=0) if self._steps > 1 else states[0]
        return whole, state, cell

    def _start(self, at: int, index: int) -> str:
        """Return the state before the first step; empty if it is 0."""
        name = self._tensor(at)
        value = self._wiring.constant(name) if name else None
        if not name or (value is not None and not value.any()):
            return ""
        picked = name
        if self._given.get("direction", b"forward") == b"bidirectional":
            picked = self._split(name, [1, 1], axis=0)[index]
        return self._add("Reshape", [picked, self._ints([self._batch, self._hidden])])

    def _with_state(self, row: str, state: str, again: Array) -> str:
        return self._add("Add", [row, self._add("MatMul", [state, self._floats(again.T)])]) if state else row

    def _lstm(self, row: str, state: str, cell: str, again: Array) -> tuple[str, str]:
        gates = self._split(self._with_state(row, state, again), [self._hidden] * 4, axis=1)
        let_in, let_out, keep = (self._add("Sigmoid", [gate]) for gate in gates[:3])
        fresh = self._add("Mul", [let_in, self._add("Tanh", [gates[3]])])
        cell = self._add("Add", [self._add("Mul", [keep, cell]), fresh]) if cell else fresh
        return self._add("Mul", [let_out, self._add("Tanh", [cell])]), cell

    def _gru(self, row: str, state: str, again: Array, kept: Array) -> str:
        hidden = self._hidden
        first, new = self._split(row, [2 * hidden, hidden], axis=1)
        gates = self._with_state(first, state, again[: 2 * hidden])
        update, reset = (self._add("Sigmoid", [gate]) for gate in self._split(gates, [hidden, hidden], axis=1))
        turned, bias = self._floats(again[2 * hidden :].T), self._floats(kept)
        if self._given.get("linear_before_reset", 0):
            old = self._add("Add", [self._add("MatMul", [state, turned]), bias]) if state else bias
            new = self._add("Add", [new, self._add("Mul", [reset, old])])
        else:
            new = self._add("Add", [new, bias])
            if state:
                new = self._add("Add", [new, self._add("MatMul", [self._add("Mul", [reset, state]), turned])])
        fresh = self._add("Tanh", [new])
        # (1 - z) * fresh + z * state
        differs = self._add("Sub", [state, fresh]) if state else self._add("Neg", [fresh])
        return self._add("Add", [fresh, self._add("Mul", [update, differs])])

    def _name(self) -> str:
        self._count += 1
        return f"{self._node.name}_unrolled_{self._count}"

    def _add(self, operator: str, inputs: list[str], answer: str = "", **attributes: Any) -> str:
        from onnx import helper

        answer = answer or self._name()
        self.nodes.append(helper.make_node(operator, inputs, [answer], name=f"{answer}_node", **attributes))
        return answer

    def _split(self, tensor: str, sizes: list[int], *, axis: int) -> list[str]:
        from onnx import helper

        answers = [self._name() for _ in sizes]
        inputs = [tensor, self._ints(sizes)]
        self.nodes.append(helper.make_node("Split", inputs, answers, name=f"{answers[0]}_node", axis=axis))
        return answers

    def _renamed(self, tensor: str, answer: str) -> None:
        maker = next(node for node in self.nodes if tensor in node.output)
        maker.output[0] = answer

    def _ints(self, values: list[int]) -> str:
        return self._stored(np.array(values, np.int64))

    def _floats(self, values: Array) -> str:
        return self._stored(np.ascontiguousarray(values, np.float32))

    def _stored(self, value: npt.NDArray[Any]) -> str:
        import onnx

        # Of the same numbers one is enough: each step multiplies by the same matrix.
        digest = hashlib.sha256(value.tobytes()).hexdigest()[:12]
        key = f"{self._node.name}_{value.dtype}_{'x'.join(map(str, value.shape))}_{digest}"
        if key not in self._names:
            self._names.add(key)
            self._model.graph.initializer.append(onnx.numpy_helper.from_array(value, key))
        return key
