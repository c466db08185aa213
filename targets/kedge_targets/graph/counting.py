"""Counts the weights and multiply-accumulates of an ONNX file by number format, for quantized graphs of every form
(QuantizeLinear and DequantizeLinear around layers, integer operators, compressed weights)."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from kedge_protocol.errors import ModelError
from kedge_targets.graph import einsum_equation, free_dimensions, nodes
from kedge_targets.graph.wiring import Wiring
from kedge_targets.true_precision import Numbers

if TYPE_CHECKING:
    import onnx

_FACTORS = {
    "Conv": (0, 1), "ConvTranspose": (0, 1), "Gemm": (0, 1), "MatMul": (0, 1), "FusedConv": (0, 1),
    "FusedMatMul": (0, 1), "ConvInteger": (0, 1), "MatMulInteger": (0, 1), "MatMulIntegerToFloat": (0, 1),
    "DynamicQuantizeMatMul": (0, 1), "MatMulNBits": (0, 1), "QLinearConv": (0, 3), "QLinearMatMul": (0, 3),
    "QGemm": (0, 3), "Einsum": (0, 1), "LSTM": (0, 1, 2), "GRU": (0, 1, 2), "RNN": (0, 1, 2),
    "DynamicQuantizeLSTM": (0, 1, 2),
}  # fmt: skip
"""Multiply-accumulate operators → the inputs that they multiply."""
_INTEGER = frozenset({
    "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearConv", "QLinearMatMul",
    "QGemm", "DynamicQuantizeLSTM",
})  # fmt: skip
_DYNAMIC = frozenset({"DynamicQuantizeMatMul", "DynamicQuantizeLSTM"})
"""Those that round what they are given by its own range."""
_CONVOLUTIONS = frozenset({"Conv", "ConvTranspose", "FusedConv", "ConvInteger", "QLinearConv"})
_TABLES = frozenset({"Gather", "GatherND", "GatherBlockQuantized"})
_RECURRENT = frozenset({"LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"})
_ROUNDING = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}) | _INTEGER
_LIKE_THE_FIRST = frozenset({
    "Gelu", "FastGelu", "QuickGelu", "BiasGelu", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization",
    "SimplifiedLayerNormalization", "QLinearAdd", "QLinearMul", "QLinearSoftmax", "QLinearSigmoid", "QLinearLeakyRelu",
    "MultiHeadAttention",
})  # fmt: skip
"""Operators of ONNX Runtime's own domain whose answer has the shape of their first input."""
_FORWARDS = frozenset({"Relu", "Clip"})
"""Operators that a runtime fuses with the preceding layer."""
_NO_WEIGHTS = ("int64", "int32", "bool")
_LARGE = 1024
"""Constants of at least this many elements count as weights; smaller ones are scales, biases and the like."""


def numbers(
    model: onnx.ModelProto,
    shapes: Mapping[str, Sequence[int]],
    *,
    integer_operators: Collection[str],
    rounded_answers: Collection[str] = (),
) -> Numbers:
    """Count the weights and multiply-accumulates of a file.

    Args:
        model: the file.
        shapes: input → shape of one sample, batch included; axes that the file leaves free are taken from it, else 1.
        integer_operators: which of Conv, ConvTranspose, Gemm and MatMul the runtime computes in integers between
            DequantizeLinear and QuantizeLinear.
        rounded_answers: those of them that it computes so only where the answer is quantized too.
    """
    counted = _Counter(model, _shapes(model, shapes), frozenset(integer_operators), frozenset(rounded_answers))
    return counted.counted()


class _Counter:
    def __init__(
        self,
        model: onnx.ModelProto,
        shapes: dict[str, tuple[int, ...]],
        integer_operators: frozenset[str],
        rounded_answers: frozenset[str],
    ) -> None:
        self._model = model
        self._shapes = shapes
        self._integer_operators = integer_operators
        self._rounded_answers = rounded_answers
        self._wiring = Wiring(model)
        self._stored = _stored(model)
        self._weights: dict[str, str] = {}  # constant → dtype that it is used in
        self._beside: set[str] = set()  # constants that weights are read back with
        self._macs = self._integer_macs = self._dynamic_macs = 0

    def counted(self) -> Numbers:
        everything = [node for graph in nodes.graphs(self._model.graph) for node in graph.node]
        for node in everything:
            if node.op_type in _FACTORS:
                self._layer(node)
        for node in everything:
            if node.op_type in _TABLES:
                self._weigh(node.input[0], rank=2)
        self._others(everything)
        sizes_: dict[str, int] = {}
        for name, kind in self._weights.items():
            sizes_[kind] = sizes_.get(kind, 0) + _bytes(self._stored[name], kind)
        return Numbers(
            weight_bytes=dict(sorted(sizes_.items())),
            macs=self._macs,
            integer_macs=self._integer_macs,
            dynamic_macs=self._dynamic_macs,
            rounds=any(node.op_type in _ROUNDING for node in everything)
            or any(kind.startswith(("int", "uint")) for kind in sizes_),
        )

    def _layer(self, node: onnx.NodeProto) -> None:
        for index in _FACTORS[node.op_type]:
            if index < len(node.input) and node.input[index]:
                self._weigh(node.input[index])
        count = self._multiplications(node)
        self._macs += count
        if self._in_integers(node):
            self._integer_macs += count
            maker = self._wiring.maker.get(self._wiring.source(node.input[0]))
            if node.op_type in _DYNAMIC or (maker is not None and maker.op_type == "DynamicQuantizeLinear"):
                self._dynamic_macs += count

    def _weigh(self, tensor: str, rank: int = 0) -> None:
        """Count the largest constant behind a tensor, if only constants are behind it."""
        found, quantized = self._origin(tensor)
        if found is None or len(self._stored[found].dims) < rank or found in self._beside:
            return
        kind = _kind(self._stored[found])
        if kind in _NO_WEIGHTS:
            return
        self._weights[found] = quantized if quantized and not kind.startswith(("int", "uint")) else kind

    def _origin(self, tensor: str) -> tuple[str | None, str]:
        """Return the largest constant behind a tensor and the dtype it is rounded to on the way; (None, "") if anything
        but constants is behind it."""
        pending, seen, constants, quantized = [tensor], {tensor}, [], ""
        while pending:
            name = pending.pop()
            if name in self._stored:
                constants.append(name)
                continue
            node = self._wiring.maker.get(name)
            if node is None or not node.input:
                return None, ""
            if node.op_type == "QuantizeLinear":
                quantized = "uint8" if len(node.input) < 3 else self._type_of(node.input[2]) or "int8"
            fresh = [given for given in node.input if given and given not in seen]
            seen |= set(fresh)
            pending += fresh
        largest = max(constants, key=lambda name: _count(self._stored[name]), default=None)
        self._beside |= set(constants) - {largest}
        return largest, quantized

    def _type_of(self, tensor: str) -> str:
        return _kind(self._stored[tensor]) if tensor in self._stored else ""

    def _others(self, everything: Sequence[onnx.NodeProto]) -> None:
        """Count large constants that no layer multiplies, such as an added position table."""
        aside = {name for node in everything if node.op_type in _ROUNDING for name in node.input[1:]} | self._beside
        for name, tensor in self._stored.items():
            large = _count(tensor) >= _LARGE and len(tensor.dims) > 1
            if large and _kind(tensor) not in _NO_WEIGHTS and name not in aside and name not in self._weights:
                self._weights[name] = _kind(tensor)

    def _in_integers(self, node: onnx.NodeProto) -> bool:
        if node.op_type in _INTEGER:
            return True
        if node.op_type not in self._integer_operators:
            return False
        if not all(self._read_back(node.input[index]) for index in _FACTORS[node.op_type]):
            return False
        return node.op_type not in self._rounded_answers or self._rounded(node.output[0])

    def _read_back(self, tensor: str) -> bool:
        """Return whether it is an integer converted back to float, possibly transposed."""
        node = self._wiring.maker.get(tensor)
        while node is not None and node.op_type in ("Transpose", "Reshape", "Squeeze", "Unsqueeze"):
            node = self._wiring.maker.get(node.input[0])
        return node is not None and node.op_type == "DequantizeLinear"

    def _rounded(self, tensor: str) -> bool:
        readers = [node for node, _ in self._wiring.readers[tensor]]
        if not readers or tensor in self._wiring.outputs:
            return False
        return all(
            node.op_type == "QuantizeLinear" or (node.op_type in _FORWARDS and self._rounded(node.output[0]))
            for node in readers
        )

    def _multiplications(self, node: onnx.NodeProto) -> int:
        """Return the multiply-accumulates of one sample. Unknown dimensions count as one."""
        made, given = self._shapes.get(node.output[0], ()), self._shapes.get(node.input[0], ())
        factor = self._shapes.get(node.input[_FACTORS[node.op_type][1]], ())
        if node.op_type in _CONVOLUTIONS:
            positions = given if node.op_type == "ConvTranspose" else made
            return _product(positions[:1]) * _product(positions[2:]) * _product(factor)
        if node.op_type in _RECURRENT:
            weights = sum(_product(self._shapes.get(node.input[index], ())) for index in (1, 2))
            return _product(given[:2]) * weights
        if node.op_type == "MatMulNBits":
            how = {attribute.name: attribute.i for attribute in node.attribute}
            return _product((*given[:-1], how.get("K", 1), how.get("N", 1)))
        if node.op_type == "Einsum":
            equation = next(attribute.s.decode() for attribute in node.attribute if attribute.name == "equation")
            shapes = [self._shapes.get(name, ()) for name in node.input]
            return _product(made) * einsum_equation.summed(equation, shapes)
        turned = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
        inner = (given[0] if turned else given[-1]) if given else factor[0] if factor else 1
        return _product(made) * max(1, inner)


def _shapes(model: onnx.ModelProto, given: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Return tensor → shape for one sample, as far as ONNX can infer it."""
    plain = _plain(model)
    free = {
        (value.name, axis): int(given[value.name][axis]) if len(given.get(value.name, ())) > axis else 1
        for value in plain.graph.input
        for axis, dim in enumerate(value.type.tensor_type.shape.dim)
        if not dim.HasField("dim_value")
    }
    try:
        made = free_dimensions.fix_dimensions(plain, free)
    except ModelError:
        made = plain
    found: dict[str, tuple[int, ...]] = {}
    for graph in nodes.graphs(made.graph):
        for value in (*graph.value_info, *graph.input, *graph.output):
            kind = value.type.tensor_type
            if kind.HasField("shape"):
                found[value.name] = tuple(dim.dim_value or 1 for dim in kind.shape.dim)
    for name, tensor in _stored(model).items():
        found[name] = tuple(tensor.dims)
    return found


def _plain(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which operators unknown to shape inference are replaced by known ones."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    # What the file says of its outputs' free axes would contradict one sample's.
    del copy.graph.value_info[:]
    matrices = {tensor.name for tensor in copy.graph.initializer if len(tensor.dims) == 2}
    for node in copy.graph.node:
        if node.domain in ("", "ai.onnx"):
            continue
        if node.op_type == "MatMulNBits":
            how = {attribute.name: attribute.i for attribute in node.attribute}
            weight = onnx.helper.make_tensor_value_info(
                f"{node.output[0]}.weight", onnx.TensorProto.FLOAT, [how.get("K", 1), how.get("N", 1)]
            )
            copy.graph.input.append(weight)
            _become(node, "MatMul", [node.input[0], weight.name])
        elif node.op_type == "FusedMatMul":
            flags = {attribute.name: attribute.i for attribute in node.attribute}
            left, right = ("ji" if flags.get("transA") else "ij"), ("kj" if flags.get("transB") else "jk")
            dots = "" if node.input[1] in matrices else "..."
            _become(node, "Einsum", node.input[:2])
            node.attribute.append(onnx.helper.make_attribute("equation", f"...{left},{dots}{right}->...ik"))
        elif node.op_type in _LIKE_THE_FIRST:
            _become(node, "Identity", [node.input[0]])
        elif node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            node.domain = ""
    return copy


def _become(node: onnx.NodeProto, operator: str, inputs: Sequence[str]) -> None:
    node.op_type, node.domain = operator, ""
    del node.input[:]
    node.input.extend(inputs)
    del node.attribute[:]


def _stored(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Return all constants, including Constant nodes and those of nested graphs."""
    found: dict[str, onnx.TensorProto] = {}
    for graph in nodes.graphs(model.graph):
        found |= {tensor.name: tensor for tensor in graph.initializer}
        found |= dict(_constants(graph))
    return found


def _constants(graph: onnx.GraphProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    for node in graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    yield node.output[0], attribute.t


def _kind(tensor: onnx.TensorProto) -> str:
    import onnx

    name = str(onnx.TensorProto.DataType.Name(tensor.data_type)).lower()
    return {"float": "float32", "double": "float64"}.get(name, name)


def _count(tensor: onnx.TensorProto) -> int:
    return _product(tensor.dims)


def _bytes(tensor: onnx.TensorProto, kind: str) -> int:
    bits = int("".join(filter(str.isdigit, kind)) or 8)
    return -(-_count(tensor) * bits // 8)


def _product(dims: Sequence[int]) -> int:
    return math.prod(max(1, int(dim)) for dim in dims)
