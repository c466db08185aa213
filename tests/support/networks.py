"""Small networks with what larger ones have: a way around, attention, outliers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from kedge_targets.graph import model_reader

Array = npt.NDArray[Any]


def graph(
    nodes: list[onnx.NodeProto], shapes: dict[str, Any], output: Any, constants: dict[str, Array]
) -> onnx.ModelProto:
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
        [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, output)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model_reader.infer_shapes(model, where="test")


def residual() -> onnx.ModelProto:
    """Input, Conv, Relu, then Conv beside a way around it, Add, Relu, pooling, Gemm."""
    rng = np.random.default_rng(0)
    w = {name: rng.standard_normal(shape).astype(np.float32) * 0.4 for name, shape in
         (("w1", (6, 3, 3, 3)), ("w2", (6, 6, 3, 3)), ("w3", (4, 6)))}  # fmt: skip
    node = helper.make_node
    nodes = [
        node("Transpose", ["x"], ["t"], name="turn", perm=[0, 3, 1, 2]),
        node("Conv", ["t", "w1"], ["c1"], name="first", pads=[1, 1, 1, 1]),
        node("Relu", ["c1"], ["r1"], name="first_relu"),
        node("Conv", ["r1", "w2"], ["c2"], name="second", pads=[1, 1, 1, 1]),
        node("Add", ["c2", "r1"], ["a"], name="around"),
        node("Relu", ["a"], ["r2"], name="second_relu"),
        node("MaxPool", ["r2"], ["m"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
        node("GlobalAveragePool", ["m"], ["p"], name="mean"),
        node("Flatten", ["p"], ["f"], name="flat"),
        node("Gemm", ["f", "w3"], ["y"], name="last", transB=1),
    ]
    return graph(nodes, {"x": ["N", 8, 8, 3]}, ["N", 4], w)


def attention() -> onnx.ModelProto:
    """One head with a mask: projections, scores, Softmax, values."""
    rng = np.random.default_rng(1)
    w = {name: rng.standard_normal((8, 8)).astype(np.float32) * 0.3 for name in ("wq", "wk", "wv")}
    node = helper.make_node
    nodes = [
        node("MatMul", ["x", "wq"], ["q"], name="query"),
        node("MatMul", ["x", "wk"], ["k"], name="key"),
        node("Transpose", ["k"], ["kt"], name="turn", perm=[0, 2, 1]),
        node("MatMul", ["q", "kt"], ["s"], name="scores"),
        node("Add", ["s", "mask"], ["sm"], name="masked"),
        node("Softmax", ["sm"], ["p"], name="softmax", axis=-1),
        node("MatMul", ["x", "wv"], ["v"], name="value"),
        node("MatMul", ["p", "v"], ["y"], name="mix"),
    ]
    return graph(nodes, {"x": ["N", 5, 8], "mask": ["N", 1, 5]}, ["N", 5, 8], w)


def with_outliers(*, factor: float = 400.0) -> onnx.ModelProto:
    """Three fully connected layers with a Relu between; one unit behind the first is ``factor`` times as large as the
    others, and counts as much as they do, because the weights of ``middle`` are as much smaller: in int8 the other
    units lose all their levels, whether the weights have one scale or one for each channel."""
    rng = np.random.default_rng(4)
    first, middle, last = (
        rng.standard_normal(shape).astype(np.float32) * 0.3 for shape in ((16, 24), (24, 20), (20, 6))
    )
    first[:, 5] *= factor
    middle[5] /= factor
    node = helper.make_node
    nodes = [
        node("MatMul", ["x", "w1"], ["a"], name="first"),
        node("Relu", ["a"], ["ar"], name="first_relu"),
        node("MatMul", ["ar", "w2"], ["b"], name="middle"),
        node("Relu", ["b"], ["br"], name="middle_relu"),
        node("MatMul", ["br", "w3"], ["y"], name="last"),
    ]
    return graph(nodes, {"x": ["N", 16]}, ["N", 6], {"w1": first, "w2": middle, "w3": last})


class Fed:
    """A :class:`kedge.step.SampleSet` of arrays; counts the samples that were read."""

    def __init__(self, **arrays: Array) -> None:
        self.arrays = arrays
        self.samples = len(next(iter(arrays.values())))
        self.read = 0

    def batches(self, size: int) -> Any:
        for start in range(0, self.samples, size):
            batch = {name: array[start : start + size] for name, array in self.arrays.items()}
            self.read = max(self.read, start + len(next(iter(batch.values()))))
            yield batch
