"""A small network like MobileNetV2, for tests: inverted residual blocks with batch normalization and Relu6."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]

CLASSES = 10
SIDE = 32

# Expansion, channels, repetitions, stride of the first: as in the paper's table, with fewer of each.
_BLOCKS = ((1, 8, 1, 1), (4, 16, 2, 2), (4, 24, 2, 2), (4, 32, 1, 2))


class _Builder:
    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._count = 0

    def constant(self, values: Array) -> str:
        self._count += 1
        self.constants.append(numpy_helper.from_array(values.astype(np.float32), f"c{self._count}"))
        return f"c{self._count}"

    def node(self, kind: str, inputs: list[str], **attributes: Any) -> str:
        self._count += 1
        name = f"{kind}_{self._count}"
        self.nodes.append(helper.make_node(kind, inputs, [f"t{self._count}"], name=name, **attributes))
        return f"t{self._count}"

    def convolution(self, given: str, channels: int, out: int, kernel: int, stride: int, group: int, act: bool) -> str:
        fan = channels // group * kernel * kernel
        weight = self.constant(
            self._random.standard_normal((out, channels // group, kernel, kernel)) / np.sqrt(fan / 2)
        )
        pad = kernel // 2
        made = self.node(
            "Conv", [given, weight], kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[pad] * 4, group=group
        )
        scale = self.constant(self._random.uniform(0.8, 1.2, out))
        rest = [self.constant(self._random.standard_normal(out) * 0.1) for _ in range(2)]
        made = self.node("BatchNormalization", [made, scale, *rest, self.constant(self._random.uniform(0.8, 1.2, out))])
        if act:
            made = self.node("Clip", [made, self.constant(np.array(0.0)), self.constant(np.array(6.0))])
        return made

    def block(self, given: str, channels: int, out: int, expansion: int, stride: int) -> str:
        wide = channels * expansion
        made = self.convolution(given, channels, wide, 1, 1, 1, True) if expansion > 1 else given
        made = self.convolution(made, wide, wide, 3, stride, wide, True)
        made = self.convolution(made, wide, out, 1, 1, 1, False)
        return self.node("Add", [given, made]) if stride == 1 and channels == out else made


def mobile_network(*, batch: int | str = "N", opset: int = 17, seed: int = 0) -> onnx.ModelProto:
    """Input ``image`` N x 3 x 32 x 32, output ``score`` N x 10."""
    build = _Builder(seed)
    tensor = build.convolution("image", 3, 8, 3, 2, 1, True)
    channels = 8
    for expansion, out, repetitions, stride in _BLOCKS:
        for repetition in range(repetitions):
            tensor = build.block(tensor, channels, out, expansion, stride if repetition == 0 else 1)
            channels = out
    tensor = build.convolution(tensor, channels, 64, 1, 1, 1, True)
    tensor = build.node("Flatten", [build.node("GlobalAveragePool", [tensor])])
    rng = np.random.default_rng(seed + 1)
    weight, bias = build.constant(rng.standard_normal((CLASSES, 64)) / 4), build.constant(rng.standard_normal(CLASSES))
    build.nodes.append(helper.make_node("Gemm", [tensor, weight, bias], ["score"], name="classifier", transB=1))
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        build.nodes,
        "mobile",
        [value("image", TensorProto.FLOAT, [batch, 3, SIDE, SIDE])],
        [value("score", TensorProto.FLOAT, [batch, CLASSES])],
        build.constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def pictures(count: int, *, seed: int = 1) -> Array:
    """Smooth random pictures, count x 3 x 32 x 32: coarse noise made larger."""
    coarse = np.random.default_rng(seed).standard_normal((count, 3, 8, 8))
    return np.kron(coarse, np.ones((1, 1, 4, 4))).astype(np.float32)
