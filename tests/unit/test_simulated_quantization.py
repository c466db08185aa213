"""Quantization simulated in the graph: where the nodes stand, what they hold, and that they can be taken out again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.support import lowering
from tests.support.lowering import Calibration, classifier, images
from tests.support.networks import attention, residual

from kedge_protocol.errors import LoweringError, UnsupportedOperatorError
from kedge_targets import registry, target
from kedge_targets.graph import fakequant, layers, library, model_reader, qonnx, quantizers, rounding
from kedge_targets.graph.wiring import Wiring
from kedge_targets.numerics import Granularity, Plan, Precision, QuantizationScheme, RangeMethod

Array = npt.NDArray[Any]
SIGNED = QuantizationScheme(
    activation="int8", weight="int8", symmetric_activation=True, granularity=Granularity.PER_TENSOR, reduced_range=True
)


def run(model: onnx.ModelProto, feeds: dict[str, Array] | Array) -> Array:
    options = library.load().SessionOptions()
    options.log_severity_level = 4
    session = library.opened(qonnx.expand_qonnx(model).SerializeToString(), options, where="g")
    given = feeds if isinstance(feeds, dict) else {session.get_inputs()[0].name: feeds}
    made: Array = session.run(None, given)[0]
    return made


def samples(count: int = 12) -> Array:
    return np.random.default_rng(2).standard_normal((count, 8, 8, 3)).astype(np.float32)


def quants(model: onnx.ModelProto) -> dict[str, dict[str, Any]]:
    """Tensor → what its Quant node holds."""
    wiring = Wiring(model)
    found = {}
    for node in model.graph.node:
        if node.op_type == "Quant":
            scale, zero, bits = (wiring.constant(tensor) for tensor in node.input[1:])
            assert bits is not None
            flags = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            found[node.input[0]] = {"scale": scale, "zero": zero, "bits": int(bits), **flags}
    return found


def test_the_layers_of_a_graph() -> None:
    found = {layer.name: layer for layer in layers.layers(residual())}
    assert list(found) == ["first", "second", "last"]
    assert [(layer.weight, layer.axis, layer.activations) for layer in found.values()] == [
        ("w1", 0, ("t",)), ("w2", 0, ("r1",)), ("w3", 0, ("f",)),
    ]  # fmt: skip
    head = {layer.name: layer for layer in layers.layers(attention())}
    assert [name for name, layer in head.items() if layer.weight is None] == ["scores", "mix"]
    assert head["query"].axis == 1
    assert head["mix"].activations == ("p", "v")
    assert head["query"].size == 64


def test_weights_behind_a_transpose_and_from_the_left_and_tables() -> None:
    node = helper.make_node
    nodes = [
        node("Transpose", ["w"], ["wt"], name="turn", perm=[1, 0]),
        node("Gather", ["table", "ids"], ["e"], name="embed"),
        node("MatMul", ["e", "wt"], ["a"], name="right"),
        node("MatMul", ["left", "a"], ["y"], name="leftmost"),
    ]
    made = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["N", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2, 5])],
        [numpy_helper.from_array(np.ones(shape, dtype=np.float32), name)
         for name, shape in (("w", (5, 4)), ("table", (7, 4)), ("left", (2, 3)))],
    )  # fmt: skip
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    found = {layer.name: layer for layer in layers.layers(model)}
    assert [(one.operator, one.weight, one.axis) for one in found.values()] == [
        ("Gather", "table", 0), ("MatMul", "wt", 1), ("MatMul", "left", 0),
    ]  # fmt: skip
    simulated = fakequant.insert_quantizers(model, Plan(default=Precision.INT8), {"e": (0, 1), "a": (0, 4)})
    assert run(simulated, {"ids": np.array([[1, 2, 3]])}).shape == (1, 2, 5)
    assert set(quants(simulated)) == {"table", "wt", "left", "e", "a"}


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.W8A8, Precision.W4A4, Precision.INT8_DYNAMIC])
@pytest.mark.parametrize("make", [classifier, residual])
def test_what_is_put_in_can_be_taken_out(precision: Precision, make: Any) -> None:
    model = model_reader.infer_shapes(make(), where="test")
    values = images(9) if make is classifier else samples(9)
    before = model.SerializeToString()
    plan = Plan(default=precision)
    name = model.graph.input[0].name
    found = fakequant.calibrate(model, plan, Calibration(name, values))
    simulated = fakequant.insert_quantizers(model, plan, found)
    assert model.SerializeToString() == before
    plain = qonnx.expand_qonnx(simulated)
    onnx.checker.check_model(plain)
    assert 5 < rounding.sqnr_db(run(model, values), run(simulated, values)) < 70
    back, ranges = fakequant.remove_quantizers(simulated)
    assert not qonnx.is_quantized(back)
    np.testing.assert_array_equal(run(back, values), run(model, values))
    assert [node.name for node in back.graph.node] == [node.name for node in model.graph.node]
    assert set(ranges) == set(found)
    for tensor, (low, high) in ranges.items():
        assert low <= found[tensor][0] + 0.51 * (high - low) / 7
        assert high >= found[tensor][1] - 0.51 * (high - low) / 7
    # And once more from the ranges alone: the same graph.
    again = fakequant.insert_quantizers(back, Plan(default=precision, ranges=ranges), ranges)
    assert rounding.sqnr_db(run(simulated, values), run(again, values)) > 25


def test_trained_weights_and_scales_come_out() -> None:
    model = classifier()
    plan = Plan(default=Precision.INT8)
    simulated = fakequant.insert_quantizers(
        model, plan, fakequant.calibrate(model, plan, Calibration("image", images(4)))
    )
    for tensor in simulated.graph.initializer:
        if tensor.name in ("w1", "r1_scale"):
            value = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array((value * 2).astype(np.float32), tensor.name))
    back, ranges = fakequant.remove_quantizers(simulated)
    old = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    new = {tensor.name: numpy_helper.to_array(tensor) for tensor in back.graph.initializer}
    assert sorted(new) == sorted(old)
    np.testing.assert_array_equal(new["w1"], old["w1"] * 2)
    plain = fakequant.remove_quantizers(
        fakequant.insert_quantizers(model, plan, dict(fakequant.remove_quantizers(simulated)[1]))
    )[1]
    assert ranges["r1"] == pytest.approx(plain["r1"])
    assert ranges["r1"][1] == pytest.approx(
        2 * fakequant.calibrate(model, plan, Calibration("image", images(4)))["r1"][1]
    )


def test_programmable_logic_gets_what_it_can_build() -> None:
    model = residual()
    plan = Plan(
        default=Precision.W4A4, layers={"second": Precision.W3A3, "last": Precision.W8A8}, range_method=RangeMethod.MSE
    )
    found = fakequant.calibrate(model, plan, Calibration("x", samples()))
    made = quants(fakequant.insert_quantizers(model, plan, found))
    # The input before the Transpose, and every Relu before the pooling: quantized where they arise.
    assert list(found) == ["x", "r1", "c2", "r2", "p"]
    assert {name: made[name]["bits"] for name in found} == {"x": 8, "r1": 8, "c2": 8, "r2": 8, "p": 8}
    for name in ("r1", "r2", "p"):
        assert (made[name]["signed"], made[name]["zero"]) == (0, 0)
    for name in ("x", "c2"):
        assert (made[name]["signed"], made[name]["narrow"], made[name]["zero"]) == (1, 1, 0)
    assert made["c2"]["scale"] == made["r1"]["scale"]
    assert {name: made[name]["bits"] for name in ("w1", "w2", "w3")} == {"w1": 4, "w2": 3, "w3": 8}
    for name, shape in (("w1", (6, 1, 1, 1)), ("w2", (6, 1, 1, 1)), ("w3", (4, 1))):
        assert made[name]["scale"].shape == shape
        assert (made[name]["signed"], made[name]["narrow"]) == (1, 1)
        assert not made[name]["zero"].any()


def test_an_input_that_is_never_negative_is_unsigned() -> None:
    model = residual()
    plan = Plan(default=Precision.W4A4)
    values = np.round(np.abs(samples()) * 60).clip(0, 255).astype(np.float32)
    values[0, 0, 0, 0] = 255
    made = quants(fakequant.insert_quantizers(model, plan, fakequant.calibrate(model, plan, Calibration("x", values))))
    assert (made["x"]["signed"], float(made["x"]["scale"]), made["x"]["bits"]) == (0, 1.0, 8)


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.W4A4])
def test_float_layers_are_left_alone(precision: Precision) -> None:
    model = residual()
    plan = Plan(default=Precision.FLOAT32, layers={"second": precision})
    found = fakequant.calibrate(model, plan, Calibration("x", samples()))
    simulated = fakequant.insert_quantizers(model, plan, found)
    assert set(quants(simulated)) == {"w2", "r1"}
    whole = fakequant.insert_quantizers(model, Plan(default=Precision.FLOAT32), {})
    np.testing.assert_array_equal(run(whole, samples()), run(model, samples()))


def test_attention_follows_the_plan_and_its_mask_is_left_alone() -> None:
    model = attention()
    feeds = {
        "x": np.random.default_rng(3).standard_normal((6, 5, 8)).astype(np.float32),
        "mask": np.where(np.arange(5) < 3, 0, -10000).astype(np.float32).reshape(1, 1, 5).repeat(6, 0),
    }
    sample_list = [{name: array[i : i + 1] for name, array in feeds.items()} for i in range(6)]
    plan = Plan(default=Precision.INT8)
    found = fakequant.calibrate(model, plan, sample_list)
    assert set(found) == {"x", "q", "kt", "p", "v"}
    everything = fakequant.insert_quantizers(model, plan, found)
    assert rounding.sqnr_db(run(model, feeds), run(everything, feeds)) > 25
    kept = Plan(default=Precision.INT8, layers=dict.fromkeys(("scores", "mix"), Precision.FLOAT32))
    assert fakequant.tensors(model, kept) == ["x"]
    apart = replace(SIGNED, products=False)
    assert fakequant.tensors(model, Plan(default=Precision.INT8, scheme=apart)) == ["x"]
    named = Plan(default=Precision.INT8, layers={"mix": Precision.INT8}, scheme=apart)
    assert fakequant.tensors(model, named) == ["x", "p", "v"]


def test_the_ways_of_int8() -> None:
    model = classifier()
    plan = Plan(default=Precision.INT8, scheme=SIGNED)
    found = fakequant.calibrate(model, plan, Calibration("image", images(5)))
    assert all(low == -high for low, high in found.values())
    made = quants(fakequant.insert_quantizers(model, plan, found))
    assert {name: one["bits"] for name, one in made.items()} == {
        "image": 8, "w1": 7, "r1": 8, "w2": 7, "r2": 8, "f": 8, "w3": 7,
    }  # fmt: skip
    assert all(np.asarray(one["scale"]).size == 1 for one in made.values())
    assert all(one["signed"] and not np.any(one["zero"]) for one in made.values())
    usual = quants(fakequant.insert_quantizers(model, Plan(default=Precision.INT8), dict.fromkeys(found, (-1.0, 3.0))))
    assert (usual["image"]["signed"], float(usual["image"]["zero"])) == (0, 64.0)
    assert usual["w1"]["scale"].shape == (8, 1, 1, 1)


def test_dynamic_ranges_are_each_samples_own() -> None:
    model = model_reader.infer_shapes(classifier(), where="test")
    plan = Plan(default=Precision.INT8_DYNAMIC)
    assert fakequant.tensors(model, plan) == []
    simulated = fakequant.insert_quantizers(model, plan, {})
    values = images(6) * np.array([1, 10, 0.1, 0, 1000, 1e-3], dtype=np.float32).reshape(6, 1, 1, 1)
    whole = run(simulated, values)
    for index in range(6):
        np.testing.assert_allclose(whole[index], run(simulated, values[index : index + 1])[0], rtol=1e-4, atol=1e-6)
        if index != 3:
            assert rounding.sqnr_db(run(model, values[index : index + 1]), whole[index : index + 1]) > 20


def test_a_missing_range_and_an_unknown_layer_are_named() -> None:
    model = classifier()
    with pytest.raises(LoweringError, match=r"tensor 'r1'.*no range"):
        fakequant.insert_quantizers(model, Plan(default=Precision.INT8), {"image": (0, 1)})
    with pytest.raises(LoweringError, match=r"node 'fifth'.*has not"):
        fakequant.tensors(model, Plan(default=Precision.INT8, layers={"fifth": Precision.FLOAT32}))


def test_the_simulation_is_what_onnx_runtime_makes(tmp_path: Path) -> None:
    """Scales and zero-points of the real backend's file are the simulation's, bit for bit, and so is the error but for
    the biases, which the file rounds too."""
    model = classifier()
    path = tmp_path / "graph.onnx"
    onnx.save(model, path)
    device = target.find("generic-cpu")
    way = registry.compiler(device.backends[0].name).quantized_for(device)[0]
    # With 7 bits ONNX Runtime has weights from -64 to 64, which is one level more on each side.
    plan = Plan(default=Precision.INT8, scheme=replace(way, reduced_range=False))
    lowered = lowering.lower("generic-cpu", path, plan, Calibration("image", images(32)), tmp_path / "work")
    found = fakequant.calibrate(model, plan, Calibration("image", images(32)))
    simulated = fakequant.insert_quantizers(model, plan, found)
    made = quants(simulated)
    real = onnx.load(str(lowered.files[lowered.entry]))
    # The packed file has short names: numbers are told by what they are.
    packed = {(tensor.data_type, numpy_helper.to_array(tensor).tobytes()) for tensor in real.graph.initializer}
    for name in ("image", "r1", "r2", "w1", "w2", "w3"):
        scale, zero = made[name]["scale"].astype(np.float32), np.uint8(made[name]["zero"])
        assert (TensorProto.FLOAT, scale.tobytes()) in packed, name
        assert scale.size > 1 or (TensorProto.UINT8, zero.tobytes()) in packed, name
    values = images(64, seed=5)
    # Node by node: the kernels of a processor without VNNI would saturate here.
    options = library.load().SessionOptions()
    options.graph_optimization_level = library.load().GraphOptimizationLevel.ORT_DISABLE_ALL
    session = library.opened(real.SerializeToString(), options, where="g")
    error = session.run(None, {"image": values})[0] - run(model, values)
    expected = run(simulated, values) - run(model, values)
    assert np.corrcoef(error.ravel(), expected.ravel())[0, 1] > 0.97


@pytest.mark.parametrize("name", ["generic-cpu", "jetson-orin-nano"])
def test_ranges_of_few_values_reach_as_far_as_the_backends(name: str, tmp_path: Path) -> None:
    """ONNX Runtime's int8 reaches further than calibration saw, TensorRT's does not; the simulation follows each."""
    model = classifier()
    path = tmp_path / "graph.onnx"
    onnx.save(model, path)
    device = target.find(name)
    plan = Plan(default=Precision.INT8, scheme=registry.compiler(device.backends[0].name).quantized_for(device)[0])
    values = images(32)
    lowered = lowering.lower(name, path, plan, Calibration("image", values), tmp_path / "work")
    found = fakequant.calibrate(model, plan, Calibration("image", values))
    assert bool(found["image"][1] > np.abs(values).max()) is (name == "generic-cpu")
    scale = quants(fakequant.insert_quantizers(model, plan, found))["image"]["scale"].astype(np.float32)
    title = next(title for title in ("model_int8_qdq.onnx", "model.onnx") if title in lowered.files)
    real = onnx.load(str(lowered.files[title]))
    assert scale.tobytes() in {numpy_helper.to_array(tensor).tobytes() for tensor in real.graph.initializer}


def test_a_graph_of_qonnx_is_not_quantized_twice() -> None:
    model = classifier()
    plan = Plan(default=Precision.INT8)
    simulated = fakequant.insert_quantizers(
        model, plan, fakequant.calibrate(model, plan, Calibration("image", images(2)))
    )
    with pytest.raises((LoweringError, UnsupportedOperatorError)):
        fakequant.insert_quantizers(simulated, plan, dict.fromkeys(fakequant.tensors(simulated, plan), (0, 1)))


def test_values_that_cannot_be_negative() -> None:
    model = residual()
    wiring = Wiring(model)
    assert [name for name in ("x", "c1", "r1", "a", "r2", "m", "p", "f") if wiring.never_negative(name)] == [
        "r1", "r2", "m", "p", "f",
    ]  # fmt: skip
    assert wiring.source("m") == "r2"
    assert wiring.source("t") == "x"
    assert quantizers.style_of(Plan(default=Precision.W2A2)) == quantizers.FABRIC
