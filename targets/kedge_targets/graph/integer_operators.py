"""Rewrites operators on integers as float operators between QuantizeLinear and DequantizeLinear.

ONNX Runtime's quantizer writes three forms. Pairs around float operators are what every backend here takes; the
operator format (QLinearConv, QLinearAdd, …) and dynamic ranges (DynamicQuantizeLinear, MatMulInteger, …) run in ONNX
Runtime alone. Scales stay the file's own. Activations that are rounded by the range of each call are not rounded any
more, since that range is in no file.

Operators: ONNX specification, and ONNX Runtime, docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kedge_protocol.errors import UnsupportedOperatorError
from kedge_targets.graph import dead_code, nodes, opsets
from kedge_targets.graph.pair_writing import PairWriting, Scale
from kedge_targets.graph.scaled_products import Product, product_of

if TYPE_CHECKING:
    import onnx

_CONTRIBUTED = "com.microsoft"
_AXIS_OPSET = 13
"""First opset in which DequantizeLinear has an axis, and Softmax is over one axis."""
_AXES_GIVEN = 18
"""First opset in which ReduceMean takes its axes as a tensor."""
_FLOAT = 1


@dataclass(frozen=True, kw_only=True)
class _Form:
    """How the inputs of an operator on integers lie: (integers, scale, zero-point), and those of its answer.

    Attributes:
        operator: that computes the same in float.
        given: for each input of the float operator, the three indices.
        axes: of a scale for each channel, for each input.
    """

    operator: str
    given: tuple[tuple[int, int, int], ...]
    axes: tuple[int | None, ...] = (None, None)

    @property
    def answer(self) -> tuple[int, int]:
        """The indices of the answer's scale and zero-point."""
        return 3 * len(self.given), 3 * len(self.given) + 1


_ONE, _TWO = ((0, 1, 2),), ((0, 1, 2), (3, 4, 5))
_FORMS = {
    "QLinearConv": _Form(operator="Conv", given=_TWO, axes=(None, 0)),
    "QLinearMatMul": _Form(operator="MatMul", given=_TWO, axes=(-2, -1)),
    "QLinearAdd": _Form(operator="Add", given=_TWO),
    "QLinearMul": _Form(operator="Mul", given=_TWO),
    "QLinearSigmoid": _Form(operator="Sigmoid", given=_ONE),
    "QLinearLeakyRelu": _Form(operator="LeakyRelu", given=_ONE),
    "QLinearSoftmax": _Form(operator="Softmax", given=_ONE),
    "QLinearAveragePool": _Form(operator="AveragePool", given=_ONE),
    "QLinearGlobalAveragePool": _Form(operator="GlobalAveragePool", given=_ONE),
    "QLinearReduceMean": _Form(operator="ReduceMean", given=_ONE),
}
_PRODUCTS = frozenset({"MatMulInteger", "ConvInteger"})
INTEGER_OPERATORS = frozenset({
    *_FORMS, *_PRODUCTS, "QGemm", "QLinearConcat", "QLinearWhere", "DynamicQuantizeLinear", "DynamicQuantizeMatMul",
    "MatMulIntegerToFloat", "DynamicQuantizeLSTM", "QAttention",
})  # fmt: skip
_MOVING = frozenset({
    "Identity", "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "MaxPool", "Slice", "Split", "Gather",
    "GatherElements", "GatherND", "Expand", "Tile", "Concat", "Pad", "DepthToSpace", "SpaceToDepth", "ReduceMax",
    "ReduceMin", "ArgMax", "ArgMin", "TopK", "Resize",
})  # fmt: skip
"""Operators that give some of the numbers that they are given, integers or not; Resize also some in between."""


def in_pairs(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with float operators between pairs in place of its operators on integers, and of those that move
    integers; the given model if it has none.

    Raises:
        UnsupportedOperatorError: one of them cannot be written so; names it.
    """
    import onnx

    if all(node.op_type not in INTEGER_OPERATORS | {"DequantizeLinear"} for node in model.graph.node):
        _refuse_remaining(model)
        return model
    made = onnx.ModelProto()
    made.CopyFrom(model)
    rewriting = _Rewriting(made)
    for node in model.graph.node:
        rewriting.write(node)
    if not rewriting.changed:
        _refuse_remaining(model)
        return model
    rewriting.writing.finish()
    _refuse_remaining(made)
    if rewriting.writing.by_channel:
        made = opsets.raise_opset(made, _AXIS_OPSET, where="the quantized model")
    return made


def _refuse_remaining(model: onnx.ModelProto) -> None:
    for graph in nodes.graphs(model.graph):
        for node in graph.node:
            if node.op_type in INTEGER_OPERATORS:
                raise UnsupportedOperatorError(
                    f"computes with integers already ({node.op_type}), in a form that no float operator between "
                    "QuantizeLinear and DequantizeLinear has",
                    where=f"node {node.name!r}",
                    remedy="Give the float model, or one quantized in the QDQ format; Kedge quantizes it for each "
                    "target",
                )


class _Rewriting:
    """Writes the nodes of a model one by one.

    Attributes:
        writing: what is written so far.
        changed: whether a node is another one now.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.writing = PairWriting(model)
        self.changed = False
        self._opset = opsets.version(model)
        self._wiring = self.writing.wiring
        self._done: set[str] = set()  # answers of nodes whose work is done elsewhere
        self._by_operator: Mapping[str, Callable[[onnx.NodeProto], bool]] = {
            **dict.fromkeys(_FORMS, self._plain),
            **dict.fromkeys(_PRODUCTS, self._product),
            **dict.fromkeys(_MOVING, self._moved),
            "QuantizeLinear": self._rounded,
            "DequantizeLinear": self._read_back,
            "DynamicQuantizeLinear": self._rounded_by_each_call,
            "QGemm": self._gemm,
            "QLinearConcat": self._concat,
            "QLinearWhere": self._where,
            "DynamicQuantizeMatMul": self._product_with_weights,
            "MatMulIntegerToFloat": self._product_with_weights,
            "DynamicQuantizeLSTM": self._recurrent,
            "QAttention": self._attention,
        }

    def write(self, node: onnx.NodeProto) -> None:
        """Write one node, after all that it reads."""
        if node.output[0] in self._done:
            return
        known = node.domain in ("", nodes.DEFAULT_DOMAIN, _CONTRIBUTED) and node.op_type in self._by_operator
        if known and self._by_operator[node.op_type](node):
            self.changed = True
            return
        for tensor in dead_code.inputs_of(node):
            self.writing.require(tensor)
        self.writing.add(node)

    def _rounded(self, node: onnx.NodeProto) -> bool:
        if self._wiring.constant(node.input[0]) is None and self.writing.single(node.input[1]):
            self.writing.scales[node.output[0]] = Scale(node.input[1], _given(node, 2))
        return False

    def _rounded_by_each_call(self, node: onnx.NodeProto) -> bool:
        self.writing.floats[node.output[0]] = node.input[0]
        return False  # stays if anything else reads what it gives

    def _read_back(self, node: onnx.NodeProto) -> bool:
        tensor = node.input[0]
        maker = self._wiring.maker.get(tensor)
        if tensor not in self.writing.floats or (maker is not None and maker.op_type == "QuantizeLinear"):
            return False
        if self._number(node, (0, 1, 2), None) is None:
            return False
        self.writing.node("Identity", [self.writing.floats[tensor]], node.output, name=node.name)
        return True

    def _moved(self, node: onnx.NodeProto) -> bool:
        """Write an operator that moves integers as one that moves what they stand for."""
        data = list(node.input) if node.op_type == "Concat" else list(node.input[:1])
        if not all(self._is_quantized(tensor) for tensor in data):
            return False
        scale = self._scale_of(data[0])
        if not all(self.writing.same(scale, self._scale_of(tensor)) for tensor in data):
            return False
        rest = list(node.input)[len(data) :]
        if node.op_type == "Pad" and not self._filled(node, rest, scale):
            return False
        # What is no integer of the scale keeps its name: places of the largest, for one.
        moved = {"ArgMax": 0, "ArgMin": 0, "TopK": 1, "MaxPool": 1}.get(node.op_type, len(node.output))
        answers = [
            self.writing.fresh(f"{tensor}_float") if index < moved else tensor
            for index, tensor in enumerate(node.output)
        ]
        if scale is None:
            self.writing.add(node)  # of use if anything else reads these integers
        self.writing.add(_with(node, [*(self.writing.read_back(one, scale) for one in data), *rest], answers))
        for tensor, answer in list(zip(node.output, answers, strict=True))[:moved]:
            self.writing.floats[tensor] = answer
            if scale is not None:
                self.writing.scales[tensor] = scale
        if node.op_type == "Resize" and scale is not None:
            self.writing.require(node.output[0])
            del self.writing.floats[node.output[0]]
        return True

    def _filled(self, node: onnx.NodeProto, rest: list[str], scale: Scale | None) -> bool:
        """Set the number that a Pad fills in; by default that is the integer 0, which need not stand for 0."""
        mode = next((one.s for one in node.attribute if one.name == "mode"), b"constant")
        if mode != b"constant":
            return True
        value = self._wiring.constant(rest[1]) if len(rest) > 1 and rest[1] else np.zeros((), np.int8)
        if scale is None or value is None or not rest:
            return False
        step, zero = self.writing.numbers(scale)
        rest[1:2] = [self.writing.constant(np.asarray((float(value.reshape(-1)[0]) - zero) * step, np.float32))]
        return True

    def _plain(self, node: onnx.NodeProto) -> bool:
        form = _FORMS[node.op_type]
        found = [self._number(node, three, axis) for three, axis in zip(form.given, form.axes, strict=False)]
        if form.operator == "Conv" and _given(node, 8):
            found.append(self.writing.bias(node.input[8], node.input[1], node.input[4]))
        attributes = self._attributes(node)
        if attributes is None:
            return False
        if form.operator == "ReduceMean" and self._opset >= _AXES_GIVEN:
            axes = [list(one.ints) for one in attributes if one.name == "axes"]
            found += [self.writing.constant(np.array(one, np.int64), "kedge_axes") for one in axes]
            attributes = [one for one in attributes if one.name != "axes"]
        return self._answered(node, form.operator, found, form.answer, attributes)

    def _attributes(self, node: onnx.NodeProto) -> list[onnx.AttributeProto] | None:
        """Return a node's attributes without ONNX Runtime's own; None where these make it another operator."""
        own = {one.name: one.i for one in node.attribute if one.name in ("channels_last", "opset")}
        # Until opset 12 a Softmax is over all axes from the given one on.
        older = "opset" in own and (own["opset"] < _AXIS_OPSET) != (self._opset < _AXIS_OPSET)
        if own.get("channels_last", 0) or older:
            return None
        return [one for one in node.attribute if one.name not in own]

    def _gemm(self, node: onnx.NodeProto) -> bool:
        how = {one.name: one for one in node.attribute}
        turned = "transB" in how and how["transB"].i
        found = [self._number(node, (0, 1, 2), None), self._number(node, (3, 4, 5), 0 if turned else 1)]
        if _given(node, 6):
            alpha = how["alpha"].f if "alpha" in how else 1.0
            found.append(self.writing.bias(node.input[6], node.input[1], node.input[4], alpha))
        return self._answered(node, "Gemm", found, (7, 8), node.attribute)

    def _concat(self, node: onnx.NodeProto) -> bool:
        found = [self._number(node, (at, at + 1, at + 2), None) for at in range(2, len(node.input), 3)]
        return self._answered(node, "Concat", found, (0, 1), node.attribute)

    def _where(self, node: onnx.NodeProto) -> bool:
        found = [node.input[0], self._number(node, (1, 2, 3), None), self._number(node, (4, 5, 6), None)]
        return self._answered(node, "Where", found, (7, 8))

    def _product_with_weights(self, node: onnx.NodeProto) -> bool:
        """A, B, their scales, zero-points and a bias; DynamicQuantizeMatMul rounds A itself."""
        within = node.op_type == "DynamicQuantizeMatMul"
        left = node.input[0] if within else self._number(node, (0, 2, 4), -2)
        right = self._number(node, (1, 2, 3) if within else (1, 3, 5), -1)
        if left is None or right is None:
            return False
        bias = _given(node, 4 if within else 6)
        answer = self.writing.fresh(f"{node.output[0]}_product") if bias else node.output[0]
        self.writing.node("MatMul", [left, right], [answer], name=node.name)
        if bias:
            self.writing.node("Add", [answer, bias], node.output, name=f"{node.name}_bias")
        return True

    def _recurrent(self, node: onnx.NodeProto) -> bool:
        """An LSTM whose weights lie turned: [directions, inputs, 4 * hidden]."""
        weights = []
        for index, scale, zero in ((1, 8, 9), (2, 10, 11)):
            stored, step, middle = (self._wiring.constant(node.input[at]) for at in (index, scale, zero))
            if stored is None or step is None or middle is None:
                return False
            step, middle = (
                one.reshape(one.shape[0], 1, -1) if one.size > 1 else one.reshape(()) for one in (step, middle)
            )
            value = (stored.astype(np.float32) - middle.astype(np.float32)) * step
            weights.append(self.writing.constant(np.array(value.transpose(0, 2, 1), np.float32), node.input[index]))
        given = [node.input[0], *weights, *node.input[3:8]]
        self.writing.node("LSTM", given, node.output, name=node.name, attributes=node.attribute)
        return True

    def _attention(self, node: onnx.NodeProto) -> bool:
        data, weight = self._number(node, (0, 3, 6), None), self._number(node, (1, 4, 7), 1)
        if data is None or weight is None:
            return False
        given = [data, weight, node.input[2], _given(node, 5), _given(node, 8)]
        while not given[-1]:
            given.pop()
        self.writing.node(
            "Attention", given, node.output, name=node.name, attributes=node.attribute, domain=_CONTRIBUTED
        )
        return True

    def _product(self, node: onnx.NodeProto) -> bool:
        """A product of integers up to where it is multiplied with the scales of both factors."""
        found, left = product_of(node, self._wiring), self.writing.floats.get(node.input[0])
        if found is None or left is None:
            return False
        ahead = not found.dynamic_right and (found.factor.size == 1 or self._by_column(node, found))
        right = self.writing.floats.get(node.input[1]) if found.dynamic_right else self._weight(node, found, ahead)
        if right is None:
            return False
        behind = not ahead and bool(np.any(found.factor != 1))
        result = self.writing.fresh(f"{found.answer}_product") if behind else found.answer
        operator = "MatMul" if node.op_type == "MatMulInteger" else "Conv"
        self.writing.node(operator, [left, right], [result], name=node.name, attributes=node.attribute)
        if behind:
            factor = self.writing.constant(np.asarray(found.factor, np.float32))
            self.writing.node("Mul", [result, factor], [found.answer], name=f"{node.name}_scale")
        self._done |= found.inner
        return True

    def _by_column(self, node: onnx.NodeProto, found: Product) -> bool:
        """Return whether the constant factor lies along the weight's output channels."""
        weight = self._wiring.constant(node.input[1])
        if weight is None:
            return False
        if node.op_type == "MatMulInteger":
            return weight.ndim > 1 and found.factor.shape[-1] == found.factor.size == weight.shape[-1]
        channels = (weight.shape[0], *[1] * (weight.ndim - 2))
        return found.factor.shape in (channels, (1, *channels))

    def _weight(self, node: onnx.NodeProto, found: Product, ahead: bool) -> str | None:
        """Read the weight of a product back, with the scale that stands behind the product if it lies so."""
        step = np.asarray(found.factor.reshape(-1) if ahead else np.ones(1), np.float32)
        zero = self.writing.zero(_given(node, 3))
        return self.writing.weight(node.input[1], step, zero, 0 if node.op_type == "ConvInteger" else -1)

    def _number(self, node: onnx.NodeProto, three: tuple[int, int, int], axis: int | None) -> str | None:
        """Return what integers stand for by the scale and zero-point that the node gives them."""
        tensor, step, zero = (_given(node, index) for index in three)
        if self._wiring.constant(tensor) is not None:
            return self.writing.weight(tensor, self._wiring.constant(step), self.writing.zero(zero), axis)
        known = self.writing.scales.get(tensor)
        if known is None and tensor in self.writing.floats:
            # The scale of each call has to be that of these integers.
            maker = self._wiring.maker.get(self._wiring.source(tensor))
            return self.writing.floats[tensor] if maker is not None and step == maker.output[1] else None
        scale = Scale(step, zero)
        if not self.writing.single(step) or (known is not None and not self.writing.same(known, scale)):
            return None
        return self.writing.read_back(tensor, scale)

    def _answered(
        self,
        node: onnx.NodeProto,
        operator: str,
        found: list[str | None],
        answer: tuple[int, int],
        attributes: Iterable[onnx.AttributeProto] = (),
    ) -> bool:
        """Write the float operator and round its answer; return False where an input is missing."""
        given = [tensor for tensor in found if tensor is not None]
        scale = Scale(_given(node, answer[0]), _given(node, answer[1]))
        if len(given) < len(found) or (scale.step and not self.writing.single(scale.step)):
            return False
        if not scale.step:  # QGemm may answer in float
            self.writing.node(operator, given, node.output, name=node.name, attributes=attributes)
            return True
        result = self.writing.fresh(f"{node.output[0]}_float")
        self.writing.node(operator, given, [result], name=node.name, attributes=attributes)
        self.writing.round(result, node.output[0], scale)
        return True

    def _is_quantized(self, tensor: str) -> bool:
        if tensor in self.writing.floats or tensor in self.writing.scales:
            return True
        value = self._wiring.constant(tensor)
        return value is not None and value.dtype in (np.int8, np.uint8) and self._scale_ahead(tensor) is not None

    def _scale_of(self, tensor: str) -> Scale | None:
        """Return how a tensor of integers is read back; None where that differs from call to call."""
        if tensor in self.writing.scales or tensor in self.writing.floats:
            return self.writing.scales.get(tensor)
        return self._scale_ahead(tensor)

    def _scale_ahead(self, tensor: str) -> Scale | None:
        """Return the scale by which a constant is read back after it was moved, as rows of a table are."""
        for node, index in self._wiring.readers[tensor]:
            if index == 0 and node.op_type in _MOVING and (found := self._scale_ahead(node.output[0])) is not None:
                return found
            given: tuple[tuple[int, int, int], ...] = _ONE if node.op_type == "DequantizeLinear" else ()
            given = _FORMS[node.op_type].given if node.op_type in _FORMS else given
            three = next((one for one in given if one[0] == index), None)
            if three is not None and self.writing.single(_given(node, three[1])):
                return Scale(node.input[three[1]], _given(node, three[2]))
        return None


def _given(node: onnx.NodeProto, index: int) -> str:
    return str(node.input[index]) if index < len(node.input) else ""


def _with(node: onnx.NodeProto, given: Iterable[str], answers: Iterable[str]) -> onnx.NodeProto:
    made = type(node)()
    made.CopyFrom(node)
    del made.input[:]
    del made.output[:]
    made.input.extend(given)
    made.output.extend(answers)
    return made
