"""Files as ``onnxruntime.quantization`` writes them, in each of its forms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from kedge_targets.contract import Array


@dataclass(frozen=True)
class Form:
    """How a file is quantized: ``dynamic``, ``operators`` or ``pairs``, types of activations and weights."""

    kind: str
    activation: str = "uint8"
    weight: str = "int8"
    per_channel: bool = False

    def __str__(self) -> str:
        return f"{self.kind}-{self.activation}-{self.weight}{'-per-channel' if self.per_channel else ''}"


FORMS = (
    Form("dynamic"),
    Form("dynamic", weight="uint8"),
    Form("dynamic", per_channel=True),
    Form("operators"),
    Form("operators", weight="uint8"),
    Form("operators", per_channel=True),
    Form("operators", "int8", per_channel=True),
    Form("pairs", "int8"),
    Form("pairs", weight="uint8"),
    Form("pairs", per_channel=True),
)


class Samples:
    """Drawn inputs."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], count: int = 32, seed: int = 1) -> None:
        rng = np.random.default_rng(seed)
        self.samples = count
        self.arrays: dict[str, Array] = {
            name: rng.integers(0, 50, (count, *shape)) if name == "ids" else drawn(rng, (count, *shape), 1.0)
            for name, shape in shapes.items()
        }

    def __iter__(self) -> Any:
        for at in range(self.samples):
            yield {name: array[at : at + 1] for name, array in self.arrays.items()}


def drawn(rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> Array:
    """Normal numbers, of a size that keeps that of what is multiplied with them."""
    return np.asarray(rng.standard_normal(shape) * scale, np.float32)


class _Graph:
    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.stored: list[onnx.TensorProto] = []
        self.rng = np.random.default_rng(3)

    def constant(self, value: Any) -> str:
        self.stored.append(numpy_helper.from_array(np.asarray(value, order="C"), f"c{len(self.stored)}"))
        return f"c{len(self.stored) - 1}"

    def weight(self, *shape: int, gain: float = 1.4) -> str:
        inputs = np.prod(shape[1:]) if len(shape) > 2 else shape[0]
        return self.constant(drawn(self.rng, shape, gain / np.sqrt(inputs)))

    def bias(self, size: int) -> str:
        return self.constant(drawn(self.rng, (size,), 0.2))

    def __call__(self, operator: str, *given: str, outputs: int = 1, **attributes: Any) -> str:
        name = f"t{len(self.nodes)}"
        names = [name, *(f"{name}_{index}" for index in range(1, outputs))]
        self.nodes.append(helper.make_node(operator, given, names, name=f"{operator}_{name}", **attributes))
        return name

    def model(self, ends: list[tuple[str, list[Any]]], shape: list[Any], opset: int) -> onnx.ModelProto:
        """Let the last node's answer be the model's."""
        self.nodes[-1].output[0] = "y"
        kinds = {"ids": onnx.TensorProto.INT64}
        given = [
            helper.make_tensor_value_info(name, kinds.get(name, onnx.TensorProto.FLOAT), size) for name, size in ends
        ]
        answers = [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape)]
        graph = helper.make_graph(self.nodes, "g", given, answers, self.stored)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def pictures(opset: int = 17) -> tuple[onnx.ModelProto, dict[str, tuple[int, ...]]]:
    """Convolutions with every activation and pooling that has an operator on integers; a Clip that the ends of integers
    replace."""
    make = _Graph()
    same: dict[str, Any] = {"kernel_shape": [3, 3], "pads": [1] * 4}
    first = make("Relu", make("Conv", "x", make.weight(8, 3, 3, 3), make.bias(8), **same))
    deep = make("Conv", first, make.weight(8, 1, 3, 3), make.bias(8), group=8, **same)
    deep = make("Clip", deep, make.constant(np.float32(-0.5)), make.constant(np.float32(0.5)))
    deep = make("Add", make("Conv", deep, make.weight(8, 8, 1, 1), kernel_shape=[1, 1]), first)
    deep = make("MaxPool", deep, kernel_shape=[2, 2], strides=[2, 2])
    other = make("LeakyRelu", make("Conv", deep, make.weight(8, 8, 3, 3), make.bias(8), **same), alpha=0.1)
    both = make("Concat", other, deep, axis=1)
    both = make("AveragePool", make("Mul", both, make("Sigmoid", both)), kernel_shape=[2, 2], strides=[2, 2])
    flat = make("Flatten", make("GlobalAveragePool", both))
    make("Gemm", flat, make.weight(5, 16), make.bias(5), transB=1)
    return make.model([("x", ["N", 3, 16, 16])], ["N", 5], opset), {"x": (3, 16, 16)}


def vectors(opset: int = 17) -> tuple[onnx.ModelProto, dict[str, tuple[int, ...]]]:
    """Gemm in both layouts, MatMul with a bias behind it."""
    make = _Graph()
    deep = make("Relu", make("Gemm", "x", make.weight(24, 64), make.bias(64)))
    deep = make("Relu", make("Add", make("MatMul", deep, make.weight(64, 48)), make.bias(48)))
    make("Gemm", deep, make.weight(6, 48), make.bias(6), transB=1)
    return make.model([("x", ["N", 24])], ["N", 6], opset), {"x": (24,)}


def sentences(opset: int = 17) -> tuple[onnx.ModelProto, dict[str, tuple[int, ...]]]:
    """A table, an attention, a norm, a Gelu, and the mean over the words."""
    make = _Graph()
    width, heads, length = 32, 4, 12

    def linear(tensor: str, outputs: int) -> str:
        return make("Add", make("MatMul", tensor, make.weight(width, outputs, gain=1.0)), make.bias(outputs))

    def split(tensor: str, order: list[int]) -> str:
        return make("Transpose", make("Reshape", tensor, make.constant([0, length, heads, width // heads])), perm=order)

    def norm(tensor: str) -> str:
        scale = make.constant(np.ones(width, np.float32))
        return make("LayerNormalization", tensor, scale, make.bias(width), axis=-1)

    words = norm(make("Gather", make.weight(50, width, gain=4.0), "ids"))
    left, right = split(linear(words, width), [0, 2, 1, 3]), split(linear(words, width), [0, 2, 3, 1])
    scores = make("Softmax", make("Div", make("MatMul", left, right), make.constant(np.float32(2.8))), axis=-1)
    mixed = make("MatMul", scores, split(linear(words, width), [0, 2, 1, 3]))
    mixed = make("Reshape", make("Transpose", mixed, perm=[0, 2, 1, 3]), make.constant([0, length, width]))
    words = norm(make("Add", words, linear(mixed, width)))
    inner = linear(words, width)
    half = make("Mul", inner, make.constant(np.float32(0.5)))
    erf = make("Erf", make("Div", inner, make.constant(np.float32(np.sqrt(2)))))
    words = norm(make("Add", words, make("Mul", half, make("Add", erf, make.constant(np.float32(1.0))))))
    make("ReduceMean", words, axes=[1], keepdims=0)
    return make.model([("ids", ["N", length])], ["N", width], opset), {"ids": (length,)}


def sequences(opset: int = 17) -> tuple[onnx.ModelProto, dict[str, tuple[int, ...]]]:
    """An LSTM in both directions before a product."""
    make = _Graph()
    length, inputs, hidden = 10, 16, 24
    turned = make("Transpose", "x", perm=[1, 0, 2])
    weights = [make.constant(drawn(make.rng, (2, 4 * hidden, size), 0.3)) for size in (inputs, hidden)]
    bias = make.constant(drawn(make.rng, (2, 8 * hidden), 0.2))
    states = make("LSTM", turned, *weights, bias, outputs=3, hidden_size=hidden, direction="bidirectional")
    rows = make("Reshape", make("Transpose", states, perm=[2, 0, 1, 3]), make.constant([0, length, 2 * hidden]))
    make("Add", make("MatMul", rows, make.weight(2 * hidden, 7)), make.bias(7))
    return make.model([("x", ["N", length, inputs])], ["N", length, 7], opset), {"x": (length, inputs)}


NETWORKS = {"pictures": pictures, "vectors": vectors, "sentences": sentences, "sequences": sequences}


def written(
    network: str, form: Form, folder: Path, *, opset: int = 17
) -> tuple[onnx.ModelProto, dict[str, tuple[int, ...]]]:
    """Quantize a network; return what ONNX Runtime's quantizer writes, and the shape of one sample of each input. Its
    float form lies in ``folder``, too."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )

    model, shapes = NETWORKS[network](opset)
    source, file = folder / "float.onnx", folder / "quantized.onnx"
    onnx.save(model, source)
    types = {"uint8": QuantType.QUInt8, "int8": QuantType.QInt8}
    if form.kind == "dynamic":
        quantize_dynamic(source, file, weight_type=types[form.weight], per_channel=form.per_channel)
        return onnx.load(file), shapes

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        rows = iter(Samples(shapes))

        def get_next(self) -> Any:
            return next(self.rows, None)

    quantize_static(
        source,
        file,
        Reader(),
        quant_format=QuantFormat.QOperator if form.kind == "operators" else QuantFormat.QDQ,
        activation_type=types[form.activation],
        weight_type=types[form.weight],
        per_channel=form.per_channel,
    )
    return onnx.load(file), shapes
