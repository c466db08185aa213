"""Inserts QuantizeLinear and DequantizeLinear pairs into a float graph, around integer operators and weights.

Kedge's own in place of ONNX Runtime's ``quantize_static``, which (1.31) looks neither at outputs nor at nested graphs,
gives the input of a Relu or Clip the range behind it, one axis to a weight that is used along two, and names of its own
to tensors without asking whether they are taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge_targets.graph import dead_code, qdq_placement, rounding, topological_order
from kedge_targets.graph.names import Names
from kedge_targets.graph.qdq_placement import WEIGHTED, QdqPlacement
from kedge_targets.graph.wiring import Wiring
from kedge_targets.numerics import Granularity, QuantizationScheme

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]
Ranges = Mapping[str, tuple[float, float]]

_LARGEST_BIAS = float(2**30)
"""Largest bias in steps: biases are 32-bit integers, and sums need headroom."""
_SMALLEST_STEP = float(2.0**-60)
"""Smallest scale: the product of two is still a normal float32."""


@dataclass(frozen=True, kw_only=True)
class QdqForm:
    """The form of pairs that a runtime expects.

    Attributes:
        how: types, granularity and symmetry.
        answers: whether what a node computes is rounded too, or only what it reads.
        stored: weights are stored as integers, else in float before a pair of their own.
        biases: of layers whose input is rounded are integers of 32 bits.
        everywhere: every reader of a rounded tensor is given the rounded one.
    """

    how: QuantizationScheme
    answers: bool = True
    stored: bool = True
    biases: bool = True
    everywhere: bool = False


ALREADY = "quantized already: the file's own scales are kept, and nothing is quantized twice"


def has_qdq(model: onnx.ModelProto) -> bool:
    """Return whether a graph already rounds activations, as a quantized file does."""
    wiring = Wiring(model)
    return any(node.op_type == "QuantizeLinear" and wiring.constant(node.input[0]) is None for node in model.graph.node)


def tensors_to_observe(model: onnx.ModelProto, where: QdqPlacement) -> list[str]:
    """Return the activations whose ranges :func:`insert_qdq` needs, in graph order."""
    stored = {tensor.name for tensor in model.graph.initializer}
    needed = {*where.roots.values(), *where.cuts.values()} - stored
    order = [value.name for value in model.graph.input]
    order += [tensor for node in model.graph.node for tensor in node.output]
    return [tensor for tensor in order if tensor in needed]


def insert_qdq(model: onnx.ModelProto, where: QdqPlacement, found: Ranges, form: QdqForm) -> onnx.ModelProto:
    """Return a copy of the graph with its pairs.

    Args:
        where: of :func:`kedge_targets.graph.qdq_placement.place_quantizers` for this graph.
        found: the range of each of :func:`wanted`.

    Returns:
        A graph that computes the same but for rounding. Inputs, outputs and nodes keep their names; a Relu or Clip that
        the integers' own bounds make superfluous is gone.
    """
    import onnx

    made = onnx.ModelProto()
    made.CopyFrom(model)
    writing = _Writing(made, where, found, form)
    writing.cut()
    writing.activations()
    writing.weights()
    writing.finish()
    return made


@dataclass(frozen=True)
class _Scale:
    """The names and values of a scale and a zero-point."""

    names: tuple[str, str]
    step: float
    zero: int


class _Writing:
    def __init__(self, model: onnx.ModelProto, where: QdqPlacement, found: Ranges, form: QdqForm) -> None:
        self._model = model
        self._where = where
        self._found = found
        self._form = form
        self._wiring = Wiring(model)
        self._names = Names(model)
        self._stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self._roots = dict(where.roots)
        self._scales: dict[str, _Scale] = {}
        self._given: dict[str, _Scale] = {}
        self._weights: dict[tuple[object, ...], str] = {}
        self._new: list[onnx.NodeProto] = []
        self._signed = form.how.activation == "int8"
        # Symmetric weights, whose lowest integer is not used; with 7 bits it is.
        self._most = 64 if form.how.reduced_range else 127

    def cut(self) -> None:
        """Remove each Relu and Clip that the integer bounds make redundant, before other tensors are rounded."""
        gone: list[onnx.NodeProto] = []
        for node in self._model.graph.node:
            before = self._where.cuts.get(node.name)
            if before is None:
                continue
            maker = self._wiring.maker[before]
            if self._superfluous(node):
                maker.output[list(maker.output).index(before)] = node.output[0]
                self._wiring.maker[node.output[0]] = maker
                gone.append(node)
            else:
                self._roots[before] = before
                self._where.reads.add((node.name, 0))
        for node in gone:
            self._model.graph.node.remove(node)

    def _superfluous(self, node: onnx.NodeProto) -> bool:
        bounds = qdq_placement.bounds_of(node, self._wiring)
        if bounds is None:
            return False
        one = self._scale(node.output[0])
        least, most = rounding.bounds(8, signed=self._signed)
        low, high = (least - one.zero) * one.step, (most - one.zero) * one.step
        return low >= bounds[0] - 1e-3 * one.step and high <= bounds[1] + 1e-3 * one.step

    def activations(self) -> None:
        """Round each tensor once, and connect its integer readers to the rounded one."""
        for tensor, root in self._roots.items():
            maker = self._wiring.maker.get(tensor)
            if maker is None and not self._wiring.is_input(tensor):
                continue
            computed = maker is not None and maker.name in self._where.integers and self._form.answers
            readers = [
                (node, index)
                for node, index in self._wiring.readers[tensor]
                if computed or self._form.everywhere or (node.name, index) in self._where.reads
            ]
            if computed and maker is not None and tensor in self._wiring.outputs:
                # Others know it by name: the name stays with what is read back.
                raw, back = self._names.fresh(f"{tensor}_unrounded"), tensor
                maker.output[list(maker.output).index(tensor)] = raw
            else:
                raw, back = tensor, self._names.fresh(f"{tensor}_rounded")
            self._pair(raw, back, self._scale(root))
            for node, index in readers:
                node.input[index] = back

    def _pair(self, raw: str, back: str, scale: _Scale) -> None:
        down = self._names.fresh(f"{raw}_integers")
        self._node("QuantizeLinear", [raw, *scale.names], down)
        self._node("DequantizeLinear", [down, *scale.names], back)
        self._given[back] = scale

    def _node(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> None:
        from onnx import helper

        name = self._names.fresh_node(f"{output}_{operator}")
        self._new.append(helper.make_node(operator, inputs, [output], name=name, **attributes))

    def _scale(self, root: str) -> _Scale:
        """Return the scale of an activation, or of a constant that is read like one."""
        if root not in self._scales:
            value = self._wiring.constant(root) if root in self._stored else None
            low, high = self._found[root] if value is None else (float(value.min()), float(value.max()))
            how = self._form.how
            step, zero = rounding.scale_and_zero_point(
                low, high, bits=8, signed=self._signed, symmetric=how.symmetric_activation
            )
            step = max(step, _SMALLEST_STEP)
            names = self._number(f"{root}_scale", np.float32(step)), self._number(f"{root}_zero", self._integer(zero))
            self._scales[root] = _Scale(names, step, zero)
        return self._scales[root]

    def _integer(self, value: Any) -> Array:
        return np.asarray(value, np.int8 if self._signed else np.uint8)

    def _number(self, base: str, value: Any) -> str:
        from onnx import numpy_helper

        name = self._names.fresh(base)
        self._model.graph.initializer.append(numpy_helper.from_array(np.asarray(value, order="C"), name))
        return name

    def weights(self) -> None:
        """Round the constants of integer nodes."""
        for node in self._model.graph.node:
            if node.name not in self._where.integers:
                continue
            for index, name in enumerate(node.input):
                like_activation = (node.name, index) in self._where.constants
                if name in self._stored and (like_activation or (node.op_type == "Gather" and index == 0)):
                    node.input[index] = self._table(name)
            if node.op_type in WEIGHTED:
                self._weighted(node)

    def _table(self, name: str) -> str:
        """Round a constant that is read like an activation: one scale with a zero-point."""
        key = ("table", name)
        if key not in self._weights:
            scale = self._scale(name)
            value = np.asarray(self._wiring.constant(name))
            least, most = rounding.bounds(8, signed=self._signed)
            integers = rounding.quantize(value, scale.step, scale.zero, least, most)
            self._weights[key] = self._read_back(name, value, self._integer(integers), scale.names)
        return self._weights[key]

    def _read_back(self, name: str, value: Array, integers: Array, scale: tuple[str, str], **axis: int) -> str:
        back = self._names.fresh(f"{name}_rounded")
        if self._form.stored:
            self._node("DequantizeLinear", [self._number(f"{name}_integers", integers), *scale], back, **axis)
        else:
            down = self._names.fresh(f"{name}_integers")
            self._node("QuantizeLinear", [name, *scale], down, **axis)
            self._node("DequantizeLinear", [down, *scale], back, **axis)
        return back

    def _weighted(self, node: onnx.NodeProto) -> None:
        sides = [index for index in (0, 1) if node.input[index] in self._stored]
        if not sides:
            return
        index = sides[0]
        name = node.input[index]
        value = np.asarray(self._wiring.constant(name), np.float32)
        axis = self._axis(node, index, value)
        steps = self._steps(value, axis)
        bias = node.input[2] if len(node.input) > 2 and self._is_vector(node.input[2], steps) else ""
        given = self._given.get(node.input[1 - index]) if bias and self._form.biases else None
        if given is not None:
            numbers = np.abs(np.asarray(self._wiring.constant(bias), np.float64)).reshape(-1)
            least = numbers / (_LARGEST_BIAS * given.step)
            steps = np.maximum(steps, least if axis is not None else least.max(initial=0.0)).astype(np.float32)
        node.input[index] = self._weight(name, value, steps, axis)
        if given is not None:
            node.input[2] = self._bias(bias, given, steps)

    def _is_vector(self, name: str, steps: Array) -> bool:
        """Return whether a bias is a constant with one value for each scale. A Gemm's may broadcast otherwise, as a row
        or a number; such a bias stays in float."""
        return name in self._stored and (not steps.ndim or tuple(self._stored[name].dims) == steps.shape)

    def _axis(self, node: onnx.NodeProto, index: int, value: Array) -> int | None:
        """Return the axis of the output channels; None for one scale."""
        if self._form.how.granularity is Granularity.PER_TENSOR:
            return None
        flags = {attribute.name: attribute.i for attribute in node.attribute}
        if node.op_type == "Conv":
            return 0
        if node.op_type == "ConvTranspose":
            return 1 if flags.get("group", 1) == 1 else None
        if node.op_type == "Gemm":
            return 0 if flags.get("transB", 0) else 1
        # Kernels take one scale for a product's left side, and for a stack of matrices.
        return 1 if index == 1 and value.ndim == 2 else None

    def _steps(self, value: Array, axis: int | None) -> Array:
        rows = value.reshape(1, -1) if axis is None else np.moveaxis(value, axis, 0).reshape(value.shape[axis], -1)
        largest = np.abs(rows.astype(np.float64)).max(axis=1, initial=0.0)
        # A channel of zeros has no scale of its own, and a bias wants a fine one.
        floor = max(float(largest.max(initial=0.0)) * 2.0**-24, _SMALLEST_STEP)
        steps: Array = (np.maximum(largest, floor) / self._most).astype(np.float32)
        return steps.reshape(()) if axis is None else steps

    def _weight(self, name: str, value: Array, steps: Array, axis: int | None) -> str:
        key = (name, axis, steps.tobytes())
        if key not in self._weights:
            integers = rounding.quantize(value, steps, 0, -self._most, self._most, axis).astype(np.int8)
            scale = self._number(f"{name}_scale", steps), self._number(f"{name}_zero", np.zeros(steps.shape, np.int8))
            along = {} if axis is None else {"axis": axis}
            self._weights[key] = self._read_back(name, value, integers, scale, **along)
        return self._weights[key]

    def _bias(self, name: str, given: _Scale, steps: Array) -> str:
        scale = (np.float32(given.step) * steps).astype(np.float32)
        value = np.asarray(self._wiring.constant(name), np.float64)
        integers = np.clip(np.rint(value / scale), -(2**31), 2**31 - 1).astype(np.int32)
        back = self._names.fresh(f"{name}_rounded")
        inputs = [
            self._number(f"{name}_integers", integers),
            self._number(f"{name}_scale", scale),
            self._number(f"{name}_zero", np.zeros(scale.shape, np.int32)),
        ]
        self._node("DequantizeLinear", inputs, back, **({"axis": 0} if scale.ndim else {}))
        return back

    def finish(self) -> None:
        """Insert the new nodes in topological order and remove dead nodes."""
        arranged = topological_order.sort_nodes([*self._model.graph.node, *self._new])
        del self._model.graph.node[:]
        self._model.graph.node.extend(arranged)
        dead_code.remove_dead_nodes(self._model)
