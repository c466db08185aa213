"""A small network with dead channels."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray


def network(
    *, dead: list[int], bias: float, padded: bool, seed: int = 0, unread: bool = False, channels: int = 16
) -> onnx.ModelProto:
    """Conv, Relu, depthwise Conv, Relu, Conv, pooling, MatMul; of the first channels some are made by zeros."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Array:
        return (rng.normal(size=shape) * 0.4).astype(np.float32)

    stored = {
        "w1": normal(channels, 3, 3, 3),
        "b1": normal(channels),
        "wd": normal(channels, 1, 3, 3),
        "bd": normal(channels) + 0.2,
        "w2": normal(8, channels, 3, 3),
        "w3": normal(8, 4),
    }
    if unread:
        stored["w2"][:, dead] = 0
    else:
        stored["w1"][dead] = 0
        stored["b1"][dead] = bias
    pads = [1] * 4 if padded else [0] * 4
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w1", "b1"], ["a"], "first", pads=pads),
            helper.make_node("Relu", ["a"], ["ar"], "r1"),
            helper.make_node("Conv", ["ar", "wd", "bd"], ["d"], "depthwise", group=channels, pads=pads),
            helper.make_node("Relu", ["d"], ["dr"], "r2"),
            helper.make_node("Conv", ["dr", "w2"], ["c"], "second", pads=pads),
            helper.make_node("GlobalAveragePool", ["c"], ["g"], "pool"),
            helper.make_node("Flatten", ["g"], ["f"], "flat"),
            helper.make_node("MatMul", ["f", "w3"], ["y"], "last"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 12, 12])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
