"""Checks whether FINN will bring a quantized graph into the fabric as one piece: on the graph, before the toolchain
runs, and afterwards on what it left outside.

What converts (measured with FINN+ 1.6.1, see ``docs/fpga.md``): a chain without branches, of convolutions (dense or
depthwise) and matrices with quantized weights, each with integer inputs; Relu, batch normalization and other constant
scaling between them if a quantizer follows; MaxPool and averages on integers; Flatten before matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kedge_protocol.errors import LoweringError, UnsupportedOperatorError
from kedge_targets.backends.finn import graph_preparation
from kedge_targets.backends.finn.toolchain_client import Outside
from kedge_targets.graph import layers
from kedge_targets.graph.wiring import Wiring

if TYPE_CHECKING:
    import onnx

_QUANTIZERS = frozenset({"Quant", "IntQuant", "BipolarQuant"})
_LAYERS = frozenset({"Conv", "Gemm", "MatMul"})
_SCALING = frozenset({"Add", "Sub", "Mul", "Div"})
_MOVES = frozenset({"Flatten", "Reshape", "Identity", "Squeeze", "Unsqueeze"})
_POOLS = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool"})

INTEGERS, REAL, GIVEN = "integers", "real numbers", "the input as it is given"
"""Content of a tensor: quantized values, values computed from them, or what the caller gives (float)."""

_QUANTIZE = "Put a quantizer there (QuantIdentity or QuantReLU in Brevitas, Quant in QONNX)"
_OTHER = "or choose a target with another backend"
_MAX_BITS = 8

_REMEDIES = {
    "Softmax": "Export the model without it: the largest answer stays the same, and the application can apply it",
    "LogSoftmax": "Export the model without it: the largest answer stays the same, and the application can apply it",
    "Concat": f"Export the model as one chain of layers, {_OTHER}",
    "LeakyRelu": f"Train the model with Relu in its place, {_OTHER}",
    "HardSwish": f"Train the model with Relu in its place, {_OTHER}",
    "Sigmoid": f"Train the model with Relu in its place, leave it out where it is the last node, {_OTHER}",
    "Gelu": f"Train the model with Relu in its place, {_OTHER}",
    "Pad": "Write the padding into the attribute pads of the convolution behind it",
    "ReduceMean": "Use GlobalAveragePool in its place",
    "ArgMax": "Leave it out: the application takes the largest answer itself",
}

_SCALED = (
    "It is a scale or a bias that no quantizer behind it could take in: put a quantizer behind the last scaling "
    "(batch normalization, Mul, Add) of each layer, with one scale for the whole tensor"
)
_OUTSIDE = {
    "Mul": _SCALED,
    "Add": _SCALED,
    "Sub": _SCALED,
    "Div": _SCALED,
    "Quant": "It has too many levels for thresholds: quantize to 1 to 8 bits there",
    "MatMul": "Its input is not of integers: quantize the model's input and every activation before it",
    "Im2Col": "Its convolution's input is not of integers: quantize the model's input and every activation before it",
    "Conv": "Its input is not of integers: quantize the model's input and every activation before it",
    "MultiThreshold": "Its thresholds fit no unit: quantize to fewer bits there, and keep channels last or first alike",
    "Reshape": "Flatten just before the first matrix and nowhere else",
    "Flatten": "Flatten just before the first matrix and nowhere else",
    "MaxPool": "Pool integers: put the quantizer before it",
}
"""Operators left outside → what the user can change."""
_OUTSIDE_ELSE = (
    "Quantize the input and every activation, keep to the layers that docs/fpga.md lists, or choose a target with "
    "another backend"
)


def check(model: onnx.ModelProto, *, input_type: str | None = None) -> None:
    """Check a quantized graph (after :func:`kedge_targets.backends.finn.graph_preparation.complete_attributes`).

    Args:
        input_type: FINN's data type of the input if its values already are integers of few bits (``UINT8``).

    Raises:
        UnsupportedOperatorError: FINN cannot bring a node into the fabric as part of one chain; names the node and what
            to change.
    """
    _Check(model, input_type).run()


class _Check:
    def __init__(self, model: onnx.ModelProto, input_type: str | None) -> None:
        self._model = model
        self._wiring = Wiring(model)
        self._shapes = graph_preparation.shapes_of(model)
        self._outputs = {value.name for value in model.graph.output}
        self._given = [value.name for value in model.graph.input]
        self._constants = {tensor.name for tensor in model.graph.initializer}
        self._input_type = input_type or _annotated(model, self._given)
        # Tensor → what it holds, of activations.
        self._holds: dict[str, str] = {}

    def run(self) -> None:
        """Check each node in the graph's order."""
        self._ends()
        self._holds[self._given[0]] = INTEGERS if self._input_type else GIVEN
        for node in self._model.graph.node:
            if self._constant(node):
                continue
            activations = [name for name in node.input if name and name not in self._constants]
            if len(activations) > 1:
                raise self._joined(node, activations)
            self._alone(activations[0])
            held = self._holds[activations[0]]
            self._holds[node.output[0]] = self._judged(node, held)
        if not any(node.op_type in _LAYERS for node in self._model.graph.node):
            raise UnsupportedOperatorError(
                "the graph has no convolution and no matrix, there is nothing to build", where="graph"
            )

    def _ends(self) -> None:
        for kind, ends in (("input", self._given), ("output", sorted(self._outputs))):
            if len(ends) != 1:
                raise UnsupportedOperatorError(
                    f"has {len(ends)} {kind}s, FINN's driver feeds one",
                    where=f"graph ({', '.join(ends)})",
                    remedy=f"Export the model with one {kind}, {_OTHER}",
                )

    def _constant(self, node: onnx.NodeProto) -> bool:
        """Return whether a node works on constants alone (a weight's quantizer)."""
        if all(name in self._constants for name in node.input if name):
            self._constants.update(node.output)
            if node.op_type in _QUANTIZERS:
                self._weight(node)
            return True
        return False

    def _alone(self, tensor: str) -> None:
        """Check that a tensor has only one use."""
        readers = [node for node, _ in self._wiring.readers[tensor]]
        ways = len(readers) + int(tensor in self._outputs)
        if ways > 1:
            names = ", ".join(f"{node.name!r} ({node.op_type})" for node in readers)
            maker = self._wiring.maker.get(tensor)
            where = f"input {tensor!r}" if maker is None else f"node {maker.name!r} ({maker.op_type})"
            raise UnsupportedOperatorError(
                f"its output goes {ways} ways (to {names}), as in a residual network; FINN builds one chain of layers",
                where=where,
                remedy=f"Train the model without the branch, {_OTHER}",
            )

    def _joined(self, node: onnx.NodeProto, activations: Sequence[str]) -> UnsupportedOperatorError:
        makers = [self._wiring.maker[name].name for name in activations if name in self._wiring.maker]
        return _refused(
            node,
            f"joins {len(activations)} branches of the network (from {', '.join(map(repr, makers)) or 'the input'}); "
            "FINN builds one chain of layers",
            f"Train the model without the branch (a residual network as a plain one), {_OTHER}",
        )

    def _judged(self, node: onnx.NodeProto, held: str) -> str:
        """Return what a node's output holds."""
        operator = node.op_type
        if operator in _QUANTIZERS:
            self._quantizer(node)
            return INTEGERS
        if operator in _LAYERS:
            self._layer(node, held)
            return REAL
        if held == INTEGERS and operator == "Mul" and node.input[0] in self._given and self._scalar(node):
            return INTEGERS  # one scale for the integers that come in, which moves behind the first layer
        if operator in _SCALING or operator == "BatchNormalization":
            return GIVEN if held == GIVEN else REAL
        if operator in _MOVES:
            return held
        if operator == "Relu":
            self._followed(node)
            return REAL
        if operator in _POOLS:
            self._pooled(node, held)
            return held if operator == "MaxPool" else REAL
        if operator == "TopK" and set(node.output) & self._outputs:
            return held
        if operator == "Transpose" and held == GIVEN:
            return held
        raise _refused(
            node,
            f"FINN brings no {operator} into the fabric",
            _REMEDIES.get(operator, f"Export the model without it, {_OTHER}"),
        )

    def _scalar(self, node: onnx.NodeProto) -> bool:
        value = self._wiring.constant(node.input[1])
        return value is not None and value.size == 1

    def _followed(self, node: onnx.NodeProto) -> None:
        """Check that a quantizer follows a Relu, which becomes part of it."""
        readers = [reader for reader, _ in self._wiring.readers[node.output[0]]]
        if not readers or any(reader.op_type not in _QUANTIZERS for reader in readers):
            what = f"{readers[0].name!r} ({readers[0].op_type})" if readers else "the output"
            raise _refused(node, f"is followed by {what} and not by a quantizer", _QUANTIZE)

    def _quantizer(self, node: onnx.NodeProto) -> None:
        scale = self._number(node, 1, "scale")
        if scale.size != 1:
            raise _refused(
                node,
                f"an activation with {scale.size} scales",
                "Quantize activations with one scale for the whole tensor",
            )
        if node.op_type != "BipolarQuant":
            self._whole(node)

    def _weight(self, node: onnx.NodeProto) -> None:
        self._number(node, 1, "scale")
        if node.op_type != "BipolarQuant":
            self._whole(node)

    def _whole(self, node: onnx.NodeProto) -> None:
        zero, bits = self._number(node, 2, "zero-point"), self._number(node, 3, "bit width")
        if np.any(zero):
            raise _refused(node, "has a zero-point other than 0", "Quantize symmetrically, or unsigned after a Relu")
        if bits.size != 1 or not 1 <= float(bits.reshape(-1)[0]) <= _MAX_BITS or float(bits.reshape(-1)[0]) % 1:
            raise _refused(
                node,
                f"quantizes to {np.unique(bits).tolist()} bits",
                f"Use 1 to {_MAX_BITS} bits: FINN gives each step of more bits a threshold of its own; at the input "
                "also 16, which the processor does (one scale, no zero-point, ROUND, not narrow)",
            )
        rounding = graph_preparation.attributes_of(node).get("rounding_mode", b"ROUND").decode()
        if rounding != "ROUND":
            raise _refused(node, f"rounds by {rounding}", "Export the model with the rounding mode ROUND")

    def _number(self, node: onnx.NodeProto, index: int, what: str) -> Any:
        value = self._wiring.constant(node.input[index]) if index < len(node.input) else None
        if value is None:
            raise _refused(node, f"its {what} is not constant", "Export the model with a fixed one")
        return value

    def _layer(self, node: onnx.NodeProto, held: str) -> None:
        index = 1
        if node.input[1] not in self._constants:
            raise _refused(node, "its weight is not constant", f"Freeze the model's weights, {_OTHER}")
        maker = self._wiring.maker.get(node.input[index])
        while maker is not None and maker.op_type in ("Transpose", "Reshape", "Identity"):
            maker = self._wiring.maker.get(maker.input[0])
        if maker is None or maker.op_type not in _QUANTIZERS:
            raise _refused(
                node,
                "its weight is not quantized",
                "Quantize it (a Quant node of 1 to 8 bits), or give the float model and let Kedge do it",
            )
        if held == GIVEN:
            raise _refused(
                node,
                "takes the model's input as it is given, in float: FINN would leave this layer, and all that is before "
                "it, outside the fabric",
                f'{_QUANTIZE}, or say what integers the input holds: input_datatype = "UINT8" in the target\'s file',
            )
        if held == REAL:
            raise _refused(node, "takes values that were not quantized since the layer before it", _QUANTIZE)
        if node.op_type == "Conv":
            self._convolution(node)
        elif node.op_type == "Gemm":
            have = graph_preparation.attributes_of(node)
            if have.get("transA", 0) or have.get("alpha", 1.0) != 1.0 or have.get("beta", 1.0) != 1.0:
                raise _refused(node, "transA, alpha or beta are not the usual ones", "Export a plain Linear layer")

    def _convolution(self, node: onnx.NodeProto) -> None:
        have = graph_preparation.attributes_of(node)
        if missing := [name for name in ("kernel_shape", "strides", "pads", "dilations", "group") if name not in have]:
            raise _refused(node, f"its attribute {missing[0]} is missing", "Export the model with it written out")
        if len(have["kernel_shape"]) != 2:
            raise _refused(
                node,
                f"is a convolution over {len(have['kernel_shape'])} axes",
                "Export it over two, one of them of size 1",
            )
        value = layers.weight_value(node.input[1], self._wiring)
        if value is not None and have["group"] != 1 and (value.shape[1] != 1 or value.shape[0] != have["group"]):
            raise _refused(
                node,
                f"has {have['group']} groups with several channels each",
                "Use a dense convolution (one group) or a depthwise one (as many groups as channels)",
            )

    def _pooled(self, node: onnx.NodeProto, held: str) -> None:
        if held != INTEGERS:
            raise _refused(node, "pools values that were not quantized", f"{_QUANTIZE}, before the pooling")
        have = graph_preparation.attributes_of(node)
        if node.op_type == "GlobalAveragePool":
            return
        if have.get("ceil_mode", 0) or any(size != 1 for size in have.get("dilations", [1])):
            raise _refused(node, "has ceil_mode or dilations", "Choose sizes at which the pooling needs neither")
        kernel, strides = have.get("kernel_shape", []), have.get("strides", [1])
        if len(kernel) != 2 or any(size < step for size, step in zip(kernel, strides, strict=False)):
            raise _refused(node, f"kernel {kernel} with strides {strides}", "Use a 2-D window no smaller than its step")
        if node.op_type == "AveragePool" and any(have.get("pads", [0])):
            raise _refused(node, "averages over padding", "Use an average without padding")


def _annotated(model: onnx.ModelProto, inputs: Sequence[str]) -> str | None:
    """Return FINN's data type of the input if the graph gives it and it is an integer type."""
    for annotation in model.graph.quantization_annotation:
        if annotation.tensor_name in inputs:
            for entry in annotation.quant_parameter_tensor_names:
                if entry.key == "finn_datatype" and "INT" in entry.value:
                    return str(entry.value)
    return None


def _refused(node: onnx.NodeProto, what: str, remedy: str) -> UnsupportedOperatorError:
    return UnsupportedOperatorError(what, where=f"node {node.name!r} ({node.op_type})", remedy=remedy)


def weighted(model: onnx.ModelProto) -> list[str]:
    """Return the names of the nodes that become matrix units, in data-flow order."""
    constant = {tensor.name for tensor in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if all(name in constant for name in node.input if name):
            constant.update(node.output)
        elif node.op_type in _LAYERS:
            found.append(node.name)
    return found


def judge(outside: Sequence[Outside]) -> list[str]:
    """Check what FINN left outside the one partition.

    Returns:
        Notes that list it.

    Raises:
        LoweringError: something that computes is outside, or the partition is interrupted; names the node.
    """
    strange = [node for node in outside if node.place == "between"]
    strange += [node for node in outside if node.operator not in ("Transpose", "TopK") and node.place != "between"]
    if strange:
        node = strange[0]
        place = "between two parts of" if node.place == "between" else node.place
        others = f", and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise LoweringError(
            f"FINN found no hardware layer for it{others}: it stays {place} the fabric, which must be one piece",
            where=f"node {node.name!r} ({node.operator}) of the streamlined graph",
            remedy=_OUTSIDE.get(node.operator, _OUTSIDE_ELSE),
        )
    if not outside:
        return ["the whole network is in the fabric"]
    listed = ", ".join(f"{node.operator} ({node.place} it)" for node in outside)
    return [f"outside the fabric, on the processor: {listed}"]
