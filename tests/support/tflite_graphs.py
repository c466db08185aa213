"""Graphs of the kinds that a ``.tflite`` once got wrong, many branches in one, so that one conversion tells of all."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[np.float32]

SAME = {"kernel_shape": [3, 3], "pads": [1] * 4}


class Stored:
    """Random weights, kept for the graph."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self.tensors: list[onnx.TensorProto] = []

    def weight(self, name: str, *shape: int, scale: float = 1.0) -> str:
        values = self._random.standard_normal(shape) * scale / np.sqrt(max(1, np.prod(shape[1:])))
        return self.value(name, values.astype(np.float32))

    def value(self, name: str, array: npt.ArrayLike) -> str:
        self.tensors.append(numpy_helper.from_array(np.asarray(array), name))
        return name


def model(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, list[int | str]],
    outputs: list[str],
    stored: Stored,
    *,
    opset: int = 17,
) -> onnx.ModelProto:
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    answers = [helper.make_empty_tensor_value_info(name) for name in outputs]
    graph = helper.make_graph(nodes, "odd", given, answers, stored.tensors)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return onnx.shape_inference.infer_shapes(made)


def odd() -> onnx.ModelProto:
    """One picture ``in put`` (N x 3 x 8 x 8) that goes ten ways; each output is a way of its own."""
    stored = Stored(3)
    node = helper.make_node
    nodes = [
        node("Conv", ["in put", stored.weight("w", 8, 3, 3, 3, scale=3.0)], ["first conv"], name="layer 1", **SAME),
        # An activation and what stands before it.
        node("Relu", ["first conv"], ["positive"], name="relu é"),
        # Padding before the largest of a window, of positive numbers and of any.
        node("MaxPool", ["positive"], ["pooled"], name="pool", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4),
        node("MaxPool", ["first conv"], ["edges"], name="edges", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4),
        # A clip beside another reader of what it clips, with bounds that exclude 0.
        node("Clip", ["first conv", stored.value("low", np.float32(0.5)), stored.value("high", np.float32(1.0))],
             ["narrow"], name="clip"),
        node("Conv", ["narrow", stored.weight("w2", 4, 8, 3, 3)], ["behind clip"], name="layer 2", **SAME),
        node("Conv", ["positive", stored.weight("w3", 4, 8, 1, 1)], ["beside clip"], name="layer 3"),
        # Boxes in pixels beside scores.
        node("Reshape", ["behind clip", stored.value("flat", np.array([0, 4, 64]))], ["flat boxes"], name="flat 1"),
        node("Sigmoid", ["flat boxes"], ["relative"], name="relative"),
        node("Mul", ["relative", stored.value("pixels", np.float32(320))], ["boxes"], name="boxes"),
        node("Reshape", ["beside clip", "flat"], ["flat scores"], name="flat 2"),
        node("Sub", ["flat scores", stored.value("shift", np.float32(3.0))], ["shifted"], name="shift"),
        node("Sigmoid", ["shifted"], ["scores"], name="scores"),
        node("Concat", ["boxes", "scores"], ["detections"], name="detections", axis=1),
        # Parts of unlike size of one tensor.
        node("Mul", ["positive", stored.value("slopes", np.array([50.0, *[0.1] * 7], np.float32).reshape(1, 8, 1, 1))],
             ["unlike"], name="unlike"),
        node("Split", ["unlike", stored.value("sizes", np.array([1, 7]))], ["large part", "small part"], name="split",
             axis=1),
    ]  # fmt: skip
    outputs = ["first conv", "pooled", "edges", "behind clip", "beside clip", "detections", "large part"]
    return model(nodes, {"in put": ["N", 3, 8, 8]}, outputs, stored)


def recurrent() -> onnx.ModelProto:
    """A word of two letters (N x 2 x 5): GRU, then LSTM, then three scores."""
    stored = Stored(4)
    node = helper.make_node
    nodes = [
        node("Transpose", ["letters"], ["steps"], name="turn", perm=[1, 0, 2]),
        node("GRU", ["steps", stored.weight("gw", 1, 24, 5), stored.weight("gr", 1, 24, 8), stored.weight("gb", 1, 48)],
             ["g"], name="gru", hidden_size=8, linear_before_reset=1),
        node("Squeeze", ["g", stored.value("one", np.array([1]))], ["g1"], name="squeeze"),
        node("LSTM", ["g1", stored.weight("lw", 1, 32, 8), stored.weight("lr", 1, 32, 8), stored.weight("lb", 1, 64)],
             ["", "last"], name="lstm", hidden_size=8),
        node("Transpose", ["last"], ["sample first"], name="turn back", perm=[1, 0, 2]),
        node("Flatten", ["sample first"], ["features"], name="flatten"),
        node("MatMul", ["features", stored.weight("wo", 8, 3, scale=2.0)], ["scores"], name="head"),
    ]  # fmt: skip
    return model(nodes, {"letters": ["N", 2, 5]}, ["scores"], stored)


def outlier() -> onnx.ModelProto:
    """Sixteen numbers, the first 300 times as large as the others, to one probability."""
    stored = Stored(5)
    weight = np.random.default_rng(6).normal(0, 0.5, (16, 32)).astype(np.float32)
    weight[0] *= 0.002
    node = helper.make_node
    nodes = [
        node("MatMul", ["x", stored.value("w", weight)], ["a"], name="first"),
        node("Relu", ["a"], ["r"], name="relu"),
        node("MatMul", ["r", stored.weight("w2", 32, 1, scale=2.0)], ["z"], name="last"),
        node("Sigmoid", ["z"], ["p"], name="sigmoid"),
    ]
    return model(nodes, {"x": ["N", 16]}, ["p"], stored)


def far_from_zero() -> onnx.ModelProto:
    """N x 12 x 12 x 3, channels last, through five convolutions. The third gives numbers of about 400, and the fourth
    takes differences of neighbours, of about 1: int8 cannot tell the neighbours apart."""
    stored = Stored(11)
    node = helper.make_node
    signs = np.sign(np.random.default_rng(12).standard_normal((32, 32, 1, 1))).astype(np.float32)
    differences = np.concatenate([signs, np.zeros_like(signs), -signs], axis=3) / 16
    weights = [
        [stored.weight("w1", 32, 3, 3, 3)],
        [stored.weight("w2", 64, 32, 3, 3, scale=2.0)],
        [stored.weight("w3", 32, 64, 3, 3, scale=2.0), stored.value("b3", np.full(32, 400, np.float32))],
        [stored.value("w4", differences)],
        [stored.weight("w5", 320, 32, 3, 3)],
    ]
    nodes, last = [node("Transpose", ["x"], ["t"], name="turn", perm=[0, 3, 1, 2])], "t"
    for number, given in enumerate(weights, 1):
        how = {"kernel_shape": [1, 3]} if number == 4 else SAME
        nodes.append(node("Conv", [last, *given], [f"c{number}"], name=f"conv {number}", **how))
        nodes.append(node("Relu", [f"c{number}"], [f"r{number}"], name=f"relu {number}"))
        last = f"r{number}"
    nodes.append(node("GlobalAveragePool", [last], ["p"], name="pool"))
    nodes.append(node("Flatten", ["p"], ["f"], name="flat"))
    nodes.append(node("Gemm", ["f", stored.weight("w6", 320, 10, scale=8.0)], ["y"], name="head"))
    return model(nodes, {"x": ["N", 12, 12, 3]}, ["y"], stored)


def far_below_zero() -> onnx.ModelProto:
    """N x 3 x 8 x 8 through a SiLU and a Hardswish whose inputs reach far below zero, as a detector's do."""
    stored = Stored(8)
    node = helper.make_node
    bias = stored.value("b", np.repeat([0.0, -60.0], 4).astype(np.float32))
    nodes = [
        node("Conv", ["x", stored.weight("w", 8, 3, 3, 3, scale=3.0), bias], ["a"], name="first", **SAME),
        node("Sigmoid", ["a"], ["s"], name="gate"),
        node("Mul", ["a", "s"], ["silu"], name="silu"),
        node("Conv", ["silu", stored.weight("w2", 8, 8, 3, 3), bias], ["c"], name="second", **SAME),
        node("HardSwish", ["c"], ["h"], name="hard"),
        node("Conv", ["h", stored.weight("w3", 4, 8, 3, 3)], ["y"], name="third", **SAME),
    ]
    return model(nodes, {"x": ["N", 3, 8, 8]}, ["y"], stored)


def old() -> onnx.ModelProto:
    """Opset 9, in which bounds and axes are attributes: N x 3 x 8 x 8 to three scores."""
    stored = Stored(7)
    node = helper.make_node
    nodes = [
        node("Conv", ["x", stored.weight("w", 8, 3, 3, 3)], ["a"], name="conv", strides=[2, 2], **SAME),
        node("Clip", ["a"], ["b"], name="clip", min=0.0, max=6.0),
        node("Pad", ["b"], ["c"], name="pad", pads=[0, 0, 1, 1, 0, 0, 1, 1]),
        node("ReduceMean", ["c"], ["d"], name="mean", axes=[2, 3], keepdims=1),
        node("Squeeze", ["d"], ["e"], name="squeeze", axes=[2, 3]),
        node("Gemm", ["e", stored.weight("w2", 8, 3), stored.weight("b2", 3)], ["y"], name="head"),
    ]
    return model(nodes, {"x": ["N", 3, 8, 8]}, ["y"], stored, opset=9)


def samples(made: onnx.ModelProto, count: int, seed: int = 0) -> list[dict[str, Array]]:
    """Normal noise, one sample each; of :func:`outlier` the first number is 300 times as large."""
    source = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        sample = {}
        for value in made.graph.input:
            shape = [dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim]
            sample[value.name] = source.standard_normal(shape).astype(np.float32)
        if "x" in sample and sample["x"].shape == (1, 16):
            sample["x"][0, 0] *= 300
        found.append(sample)
    return found


def decibels(wanted: Array, got: Array) -> float:
    """Signal-to-noise ratio; 200 where both are the same."""
    noise = float(((wanted.astype(np.float64) - got) ** 2).sum())
    return 200.0 if noise == 0 else float(10 * np.log10(float((wanted.astype(np.float64) ** 2).sum()) / noise))
