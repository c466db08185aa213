"""The ends of a graph that a search tries in float: from the inputs on and back from the outputs, few weights."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from kedge_targets.graph import ends, layers, model_reader


def detector() -> onnx.ModelProto:
    """A chain of convolutions, a large one in the middle, then two branches whose answers are joined."""
    sizes = {
        "first": (8, 3),
        "second": (8, 8),
        "middle": (256, 8),
        "after": (64, 256),
        "box": (4, 64),
        "score": (5, 64),
    }
    readers = {"first": "x", "second": "first", "middle": "second", "after": "middle", "box": "after", "score": "after"}
    nodes, weights = [], []
    for name, shape in sizes.items():
        weights.append(numpy_helper.from_array(np.ones((*shape, 3, 3), np.float32), f"{name}_w"))
        given = f"{readers[name]}_a" if readers[name] != "x" else "x"
        nodes.append(helper.make_node("Conv", [given, f"{name}_w"], [f"{name}_c"], name=name, pads=[1] * 4))
        nodes.append(helper.make_node("Relu", [f"{name}_c"], [f"{name}_a"], name=f"{name}_relu"))
    nodes.append(helper.make_node("Sigmoid", ["score_a"], ["s"], name="probability"))
    nodes.append(helper.make_node("Concat", ["box_a", "s"], ["y"], name="joined", axis=1))
    made = helper.make_graph(nodes, "g", [tensor("x", ["N", 3, 8, 8])], [tensor("y", ["N", 9, 8, 8])], weights)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model_reader.infer_shapes(model, where="g")


def tensor(name: str, shape: list[Any]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def test_the_sets_grow_and_hold_few_weights() -> None:
    model = detector()
    found = ends.ends(model)
    size = {layer.name: layer.size for layer in layers.layers(model)}
    shares = [sum(size.get(name, 0) for name in names) / sum(size.values()) for names in found]
    assert shares == sorted(shares)
    assert all(0 < share <= 2 * ends.SHARES[-1] for share in shares)
    assert all(set(small) < set(large) for small, large in itertools.pairwise(found))


def test_the_first_layers_come_with_what_lies_between_them_and_the_last_with_all_behind() -> None:
    largest = ends.ends(detector())[-1]
    assert {"first", "first_relu", "second", "second_relu"} <= set(largest)
    assert {"box", "score", "probability", "joined"} <= set(largest)
    assert {"middle", "middle_relu", "after"}.isdisjoint(largest)


def test_a_network_of_few_layers_has_no_ends() -> None:
    model = detector()
    del model.graph.node[4:]
    del model.graph.output[:]
    model.graph.output.append(tensor("second_a", ["N", 8, 8, 8]))
    assert ends.ends(model) == []
