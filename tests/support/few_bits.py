"""Networks for programmable logic: QONNX graphs as Brevitas exports them, made of random weights, and small trained
ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from kedge_targets.graph.qonnx_nodes import DOMAIN

Array = npt.NDArray[Any]


class Builder:
    """A chain of nodes, one after the other; each method returns the tensor that its node makes."""

    def __init__(self, seed: int = 0) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        self._rng = np.random.default_rng(seed)

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        name = f"constant_{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(np.asarray(value, dtype=dtype), name))
        return name

    def node(self, operator: str, *inputs: str, name: str = "", domain: str = "", **attributes: Any) -> str:
        name = name or f"{operator.lower()}_{len(self.nodes)}"
        output = f"{name}_out"
        self.nodes.append(helper.make_node(operator, list(inputs), [output], name=name, domain=domain, **attributes))
        return output

    def quant(
        self, tensor: str, scale: Any, bits: float, *, signed: int, narrow: int = 0, zero: float = 0.0, name: str = ""
    ) -> str:
        return self.node(
            "Quant",
            tensor,
            self.constant(scale),
            self.constant(zero),
            self.constant(bits),
            name=name,
            domain=DOMAIN,
            signed=signed,
            narrow=narrow,
            rounding_mode="ROUND",
        )

    def relu(self, tensor: str, bits: int, scale: float = 0.1) -> str:
        return self.quant(self.node("Relu", tensor), scale, bits, signed=0)

    def weight(self, bits: int, *shape: int) -> str:
        value = self._rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        axes = tuple(range(1, len(shape)))
        scale = np.abs(value).max(axis=axes, keepdims=True) / max(1, 2 ** (bits - 1) - 1)
        return self.quant(self.constant(value), scale, bits, signed=1, narrow=1)

    def conv(
        self, tensor: str, bits: int, shape: tuple[int, ...], *, name: str = "", bare: bool = False, **attributes: Any
    ) -> str:
        """``shape`` of the weight; with its attributes written out unless ``bare``."""
        whole: dict[str, Any] = {
            "kernel_shape": list(shape[2:]), "strides": [1, 1], "pads": [0, 0, 0, 0], "dilations": [1, 1], "group": 1,
        }  # fmt: skip
        bias = self.constant(self._rng.standard_normal(shape[0]) * 0.1)
        given = attributes if bare else {**whole, **attributes}
        return self.node("Conv", tensor, self.weight(bits, *shape), bias, name=name, **given)

    def gemm(self, tensor: str, bits: int, inputs: int, outputs: int, *, name: str = "") -> str:
        bias = self.constant(self._rng.standard_normal(outputs) * 0.1)
        return self.node("Gemm", tensor, self.weight(bits, outputs, inputs), bias, name=name, transB=1)

    def pool(self, tensor: str, size: int = 2) -> str:
        return self.node("MaxPool", tensor, kernel_shape=[size, size], strides=[size, size], pads=[0, 0, 0, 0])

    def model(self, shape: tuple[Any, ...], answer: str, classes: int = 10) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "few_bits",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(answer, TensorProto.FLOAT, [shape[0], classes])],
            self._constants,
        )
        opsets = [helper.make_opsetid("", 13), helper.make_opsetid(DOMAIN, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def network(
    *,
    bits: int = 4,
    size: int = 8,
    quantized_input: bool = True,
    residual: bool = False,
    softmax: bool = False,
    average: bool = False,
    depthwise: bool = False,
    bare: bool = False,
    input_bits: int = 8,
    seed: int = 0,
) -> onnx.ModelProto:
    """Two convolutions and two matrices on one channel of ``size`` x ``size`` (values 0 to 1), ten answers."""
    make = Builder(seed)
    x = make.quant("image", 1 / (2**input_bits - 1), input_bits, signed=0) if quantized_input else "image"
    x = make.relu(make.conv(x, bits, (8, 1, 3, 3), name="first", bare=bare, pads=[1, 1, 1, 1]), bits)
    x = make.pool(x)
    if depthwise:
        x = make.relu(make.conv(x, bits, (8, 1, 3, 3), name="depthwise", pads=[1, 1, 1, 1], group=8), bits)
    before = x
    x = make.relu(make.conv(x, bits, (8, 8, 3, 3), name="second", pads=[1, 1, 1, 1]), bits)
    if residual:
        x = make.relu(make.node("Add", x, before, name="skip"), bits)
    if average:
        x = make.node("GlobalAveragePool", x, name="average")
        x = make.quant(make.node("Flatten", x), 0.02, 8, signed=0)
    else:
        x = make.node("Flatten", x)
    features = 8 if average else 8 * (size // 2) ** 2
    x = make.relu(make.gemm(x, bits, features, 16, name="hidden"), bits)
    x = make.gemm(x, bits, 16, 10, name="scores")
    if softmax:
        x = make.node("Softmax", x, name="softmax", axis=1)
    return make.model((1, 1, size, size), x)


def saved(model: onnx.ModelProto, path: Path) -> Path:
    onnx.save_model(model, str(path))
    return path
