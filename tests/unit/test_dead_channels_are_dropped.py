"""Channels that carry nothing go, and the answers stay."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from tests.support.dead_channels import network

from kedge.pruning import dead_channels

Array = np.ndarray


def answers(model: onnx.ModelProto, x: Array) -> Array:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: Array = session.run(None, {"x": x})[0]
    return found


def pictures(count: int, seed: int) -> Array:
    return np.random.default_rng(seed).normal(size=(count, 3, 12, 12)).astype(np.float32)


def dropped(model: onnx.ModelProto) -> dead_channels.Dropped:
    return dead_channels.drop(model, [{"x": picture[None]} for picture in pictures(4, 1)])


def channels(model: onnx.ModelProto) -> list[int]:
    return [tensor.dims[0] for tensor in model.graph.initializer if len(tensor.dims) == 4]


@settings(deadline=None, max_examples=12)
@given(
    dead=st.lists(st.integers(0, 15), min_size=1, max_size=16, unique=True),
    bias=st.sampled_from([-0.3, 0.0, 0.5]),
    padded=st.booleans(),
    unread=st.booleans(),
    seed=st.integers(0, 50),
)
def test_the_answers_stay_whatever_is_dead(dead: list[int], bias: float, padded: bool, unread: bool, seed: int) -> None:
    model = network(dead=dead, bias=bias, padded=padded, unread=unread, seed=seed)
    made = dropped(model).model
    fresh = pictures(8, 9)
    wanted, got = answers(model, fresh), answers(made, fresh)
    assert np.abs(wanted - got).max() <= 1e-6 * max(1.0, np.abs(wanted).max())


def test_half_of_the_channels_dead_is_half_of_the_bytes() -> None:
    model = network(dead=list(range(0, 16, 2)), bias=-0.3, padded=True)
    found = dropped(model)
    # Behind the depthwise layer eight constants stand before a padded convolution: one channel stands for them.
    assert found.count == 7
    assert channels(found.model) == [9, 9, 8]
    assert "first 16 → 9" in found.note


def test_without_a_border_constants_go_into_the_bias() -> None:
    model = network(dead=list(range(8)), bias=0.5, padded=False)
    found = dropped(model)
    assert found.count == 8
    assert channels(found.model) == [8, 8, 8]


def test_channels_that_nobody_reads_go_too() -> None:
    found = dropped(network(dead=[1, 2, 3], bias=0.0, padded=True, unread=True))
    assert found.count == 3


def test_a_channel_that_only_looked_dead_on_the_samples_stays() -> None:
    model = network(dead=[], bias=0.0, padded=True)
    for tensor in model.graph.initializer:
        if tensor.name == "b1":
            tensor.CopyFrom(numpy_helper.from_array(np.full(16, -100, np.float32), "b1"))  # no Relu ever opens
    assert dropped(model).model is model


def test_a_whole_network_is_given_back_as_it_is() -> None:
    model = network(dead=[], bias=0.0, padded=True)
    assert not dead_channels.suspected(model)
    assert dropped(model).model is model


@pytest.mark.parametrize("all_of_them", [True, False])
def test_one_channel_is_left(all_of_them: bool) -> None:
    found = dropped(network(dead=list(range(16 if all_of_them else 15)), bias=-1.0, padded=False))
    assert channels(found.model)[0] == 1


def test_a_layer_without_layers_before_it_is_left_alone() -> None:
    weights = np.array([[4, 0], [0, 4], [0, 0]], np.float32)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Gemm", ["x", "w"], ["y"])],
        "lone",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 3])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", 2])],
        [numpy_helper.from_array(weights, "w")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    found = dead_channels.drop(model, [{"x": np.ones((1, 3), np.float32)}])
    assert found.count == 0
    assert answers(found.model, np.ones((1, 3), np.float32)).tolist() == [[4, 4]]
