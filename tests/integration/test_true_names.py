"""What a file's numbers are called: counted in the lowered file itself, on every backend that has integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.support import requirements
from tests.support.lowering import Calibration, lower
from tests.support.networks import graph

from kedge import compile as compile_model
from kedge_protocol.errors import UnsupportedOperatorError
from kedge_targets import registry, target
from kedge_targets.graph import counting, model_writer
from kedge_targets.numerics import Plan, Precision
from kedge_targets.true_precision import MIXED, Numbers, true_name

RNG = np.random.default_rng(0)


def weight(*shape: int) -> Any:
    return (RNG.standard_normal(shape) * 0.3).astype(np.float32)


def counted(model: onnx.ModelProto, device: str, plan: Plan, folder: Path) -> Numbers:
    """What the backend of a device counts in its own file."""
    source = folder / "model.onnx"
    model_writer.save(model, source)
    (info,) = model.graph.input
    shape = [dim.dim_value or 1 for dim in info.type.tensor_type.shape.dim]
    samples = RNG.standard_normal((8, *shape[1:])).astype(np.float32)
    workdir = folder / "files"
    workdir.mkdir()
    lowered = lower(device, source, plan, Calibration(info.name, samples), workdir)
    compiler = registry.compiler(target.find(device).backends[0].name)
    found = compiler.numbers(lowered.files, {lowered.inputs[0].file.name: shape})
    assert found is not None
    return found


def one_wide_one_narrow() -> onnx.ModelProto:
    """A convolution that does nearly all of the work, then a small product with a matrix."""
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c"], name="wide", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], name="mean"),
        helper.make_node("Flatten", ["p"], ["f"], name="flat"),
        helper.make_node("MatMul", ["f", "w2"], ["y"], name="narrow"),
    ]
    return graph(nodes, {"x": ["N", 4, 8, 8]}, ["N", 4], {"w1": weight(32, 4, 3, 3), "w2": weight(32, 4)})


CONV_MACS, MATMUL_MACS = 8 * 8 * 32 * 4 * 9, 32 * 4


@pytest.mark.parametrize("device", ["generic-cpu", "intel-cpu", "rpi4", "jetson-orin-nano"])
def test_int8_is_whole_where_everything_is(device: str, tmp_path: Path) -> None:
    if registry.compiler(target.find(device).backends[0].name).missing():
        requirements.missing(f"the toolchain for {device}", "make toolchains")
    numbers = counted(one_wide_one_narrow(), device, Plan(default=Precision.INT8), tmp_path)
    assert numbers.macs == CONV_MACS + MATMUL_MACS
    assert (numbers.weights_in_integers, numbers.macs_in_integers) == (1.0, 1.0)
    assert true_name(Precision.INT8, numbers) == "int8"


@pytest.mark.parametrize("device", ["generic-cpu", "intel-cpu"])
def test_one_integer_layer_of_two_is_mixed(device: str, tmp_path: Path) -> None:
    plan = Plan(default=Precision.INT8, layers={"wide": Precision.FLOAT32})
    numbers = counted(one_wide_one_narrow(), device, plan, tmp_path)
    assert numbers.integer_macs == MATMUL_MACS
    assert numbers.weights_in_integers == pytest.approx(128 / (128 + 4 * 32 * 4 * 9))
    assert true_name(Precision.INT8, numbers) == MIXED


@pytest.mark.parametrize(("device", "name"), [("generic-cpu", MIXED), ("intel-cpu", "int8"), ("rpi4", "int8")])
def test_a_transposed_convolution_is_called_what_its_runtime_makes_of_it(
    device: str, name: str, tmp_path: Path
) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("ConvTranspose", ["r", "w2"], ["y"], name="up", strides=[2, 2], kernel_shape=[2, 2]),
    ]
    model = graph(nodes, {"x": ["N", 4, 8, 8]}, ["N", 8, 16, 16], {"w1": weight(8, 4, 3, 3), "w2": weight(8, 8, 2, 2)})
    numbers = counted(model, device, Plan(default=Precision.INT8), tmp_path)
    assert true_name(Precision.INT8, numbers) == name
    assert numbers.macs == 8 * 8 * 8 * (4 * 9 + 8 * 4)
    assert numbers.integer_macs == 8 * 8 * 8 * (4 * 9 if name == MIXED else 4 * 9 + 8 * 4)


@pytest.mark.parametrize("device", ["generic-cpu", "rpi4"])
def test_ranges_of_each_call_are_counted_too(device: str, tmp_path: Path) -> None:
    numbers = counted(one_wide_one_narrow(), device, Plan(default=Precision.INT8_DYNAMIC), tmp_path)
    name = true_name(Precision.INT8_DYNAMIC, numbers)
    assert name == ("int8-dynamic" if numbers.integer_macs == numbers.macs else MIXED)
    if device == "generic-cpu":  # its convolutions have no integers of this kind
        assert name == MIXED
        assert numbers.integer_macs == MATMUL_MACS


@pytest.mark.parametrize("device", ["generic-cpu", "intel-cpu", "rpi4"])
@pytest.mark.parametrize("precision", [Precision.FLOAT16, Precision.FLOAT32])
def test_floats_are_what_they_are(precision: Precision, device: str, tmp_path: Path) -> None:
    numbers = counted(one_wide_one_narrow(), device, Plan(default=precision), tmp_path)
    assert numbers.macs_in_integers == 0.0
    assert not numbers.rounds
    assert numbers.weights_in_half == (1.0 if precision is Precision.FLOAT16 else 0.0)
    assert true_name(precision, numbers) == precision.value


@pytest.mark.parametrize("precision", [Precision.INT4, Precision.CODEBOOK4, Precision.LOG8])
def test_few_bits_keep_their_name(precision: Precision, tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")]
    model = graph(nodes, {"x": ["N", 256]}, ["N", 128], {"w": weight(256, 128)})
    numbers = counted(model, "generic-cpu", Plan(default=precision), tmp_path)
    assert numbers.macs == 256 * 128
    assert numbers.integer_macs == 0
    assert numbers.weights_in_integers == 1.0
    assert sum(numbers.weight_bytes.values()) == 256 * 128 * precision.weight_bits // 8
    assert true_name(precision, numbers) == precision.value


def quantize(tensor: str, made: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("QuantizeLinear", [tensor, "s", "z"], [f"{made}_q"]),
        helper.make_node("DequantizeLinear", [f"{made}_q", "s", "z"], [made]),
    ]


def made_by_hand(nodes: list[onnx.NodeProto], shape: list[Any], output: list[Any], **constants: Any) -> Numbers:
    stored = {"s": np.float32(0.1), "z": np.int8(0), **constants}
    return counting.numbers(
        graph(nodes, {"x": shape}, output, stored),
        {"x": [1, *shape[1:]]},
        integer_operators=("Conv", "MatMul"),
        rounded_answers=("Conv",),
    )


def test_integer_weights_beside_a_float_activation_multiply_in_float() -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["wf"]),
        helper.make_node("MatMul", ["x", "wf"], ["y"]),
    ]
    numbers = made_by_hand(nodes, ["N", 8], ["N", 4], w=np.ones((8, 4), np.int8))
    assert (numbers.weights_in_integers, numbers.macs_in_integers) == (1.0, 0.0)
    assert true_name(Precision.INT8, numbers) == MIXED


def test_weights_behind_a_cast_and_a_scale_are_what_is_stored() -> None:
    nodes = [
        helper.make_node("Cast", ["w"], ["wc"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["wc", "s"], ["wf"]),
        helper.make_node("MatMul", ["x", "wf"], ["y"]),
    ]
    numbers = made_by_hand(nodes, ["N", 8], ["N", 4], w=np.ones((8, 4), np.int8))
    assert numbers.weight_bytes == {"int8": 32}
    assert true_name(Precision.INT8, numbers) == MIXED
    halves = made_by_hand(nodes, ["N", 8], ["N", 4], w=np.ones((8, 4), np.float16))
    assert halves.weight_bytes == {"float16": 64}
    assert true_name(Precision.INT8, halves) == true_name(Precision.FLOAT32, halves) == "float16"


def test_a_convolution_that_answers_in_float_is_none_of_integers() -> None:
    nodes = [
        *quantize("x", "xr"),
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["wf"]),
        helper.make_node("Conv", ["xr", "wf"], ["y"]),
    ]
    shapes = (["N", 2, 5, 5], ["N", 3, 3, 3])
    weights = np.ones((3, 2, 3, 3), np.int8)
    assert made_by_hand(nodes, *shapes, w=weights).macs_in_integers == 0.0
    nodes[-1] = helper.make_node("Conv", ["xr", "wf"], ["c"])
    answered = made_by_hand([*nodes, *quantize("c", "y")], *shapes, w=weights)
    assert answered.macs_in_integers == 1.0
    assert answered.macs == 9 * weights.size


def test_a_tree_is_called_float32_whatever_was_asked_for() -> None:
    node = helper.make_node(
        "TreeEnsembleRegressor", ["x"], ["y"], domain="ai.onnx.ml", n_targets=1, nodes_modes=["LEAF"],
        nodes_nodeids=[0], nodes_treeids=[0], nodes_values=[0.0], nodes_featureids=[0], nodes_truenodeids=[0],
        nodes_falsenodeids=[0], target_ids=[0], target_nodeids=[0], target_treeids=[0], target_weights=[1.0],
    )  # fmt: skip
    value = helper.make_tensor_value_info
    made = helper.make_graph(
        [node], "g", [value("x", TensorProto.FLOAT, ["N", 4])], [value("y", TensorProto.FLOAT, ["N", 1])]
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("ai.onnx.ml", 1), helper.make_opsetid("", 17)])
    numbers = counting.numbers(model, {}, integer_operators=("Conv",))
    assert numbers == Numbers()
    for precision in (Precision.INT8, Precision.INT8_DYNAMIC, Precision.FLOAT16, Precision.INT4):
        assert true_name(precision, numbers) == "float32"


def forest(folder: Path, **imported: int) -> dict[str, Any]:
    """A tree as skl2onnx writes it, with data: arguments of a compilation."""
    node = helper.make_node(
        "TreeEnsembleClassifier", ["x"], ["label", "probabilities"], domain="ai.onnx.ml", name="trees",
        class_ids=[0, 1, 0, 1], class_nodeids=[1, 1, 2, 2], class_treeids=[0] * 4, class_weights=[0.9, 0.1, 0.2, 0.8],
        classlabels_int64s=[0, 1], nodes_nodeids=[0, 1, 2], nodes_falsenodeids=[2, 0, 0], nodes_featureids=[1, 0, 0],
        nodes_treeids=[0] * 3, nodes_modes=["BRANCH_LEQ", "LEAF", "LEAF"], nodes_truenodeids=[1, 0, 0],
        nodes_values=[0.1, 0.0, 0.0], post_transform="NONE",
    )  # fmt: skip
    value = helper.make_tensor_value_info
    made = helper.make_graph(
        [node], "g", [value("x", TensorProto.FLOAT, ["N", 8])], [value("probabilities", TensorProto.FLOAT, ["N", 2])]
    )
    opsets = [helper.make_opsetid(domain, version) for domain, version in {"ai.onnx.ml": 1, **imported}.items()]
    model_writer.save(helper.make_model(made, opset_imports=opsets, ir_version=8), folder / "trees.onnx")
    x = RNG.standard_normal((64, 8)).astype(np.float32)
    np.savez(folder / "calibration.npz", x=x[:32])
    np.savez(folder / "evaluation.npz", x=x[32:], label=(x[32:, 1] > 0.1).astype(np.int64))
    return {
        "model": folder / "trees.onnx",
        "name": "trees",
        "version": "1",
        "calibration": folder / "calibration.npz",
        "evaluation": folder / "evaluation.npz",
        "out": folder / "OUT",
    }


@pytest.mark.usefixtures("tflite_toolchain")
def test_a_forest_is_refused_by_its_node_on_a_raspberry_pi(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOperatorError, match="TreeEnsembleClassifier cannot be converted") as refused:
        compile_model(**forest(tmp_path, **{"": 17}), targets=["rpi4"])
    assert "node 'trees'" in str(refused.value)
    assert refused.value.remedy


@pytest.mark.parametrize(
    ("target", "imported"),
    [("generic-cpu", {"": 17}), ("generic-cpu", {}), ("intel-cpu", {"": 17})],
    ids=["both", "as XGBoost exports", "intel-cpu"],
)
def test_a_forest_costs_few_attempts_and_is_float32(target: str, imported: dict[str, int], tmp_path: Path) -> None:
    report = compile_model(**forest(tmp_path, **imported), targets=[target]).report
    assert report is not None
    (bundle,) = report.bundles
    assert bundle.precision == "float32"
    assert (bundle.value, bundle.drop) == (1.0, 0.0)
    assert bundle.size_ratio < 1.2
    assert not any("than float" in remark for remark in bundle.remarks)  # it is the float model
    assert len(bundle.attempts) <= 3 + (target == "intel-cpu")  # whose first backend reads no trees
    assert report.time_limit == 1800


def test_a_large_table_that_is_only_added_is_a_weight() -> None:
    nodes = [
        helper.make_node("Add", ["x", "table"], ["a"]),
        helper.make_node("MatMul", ["a", "w"], ["y"]),
    ]
    numbers = made_by_hand(nodes, ["N", 64, 32], ["N", 64, 4], table=weight(64, 32), w=weight(32, 4))
    assert numbers.weight_bytes == {"float32": 4 * (64 * 32 + 32 * 4)}


def test_weights_of_an_inner_graph_are_counted() -> None:
    value = helper.make_tensor_value_info
    branches = {
        name: helper.make_graph(
            [helper.make_node("MatMul", ["x", f"w_{name}"], [name])],
            name,
            [],
            [value(name, TensorProto.FLOAT, ["N", 4])],
            [numpy_helper.from_array(weight(8, 4), f"w_{name}")],
        )
        for name in ("yes", "no")
    }
    node = helper.make_node("If", ["c"], ["y"], then_branch=branches["yes"], else_branch=branches["no"])
    made = helper.make_graph(
        [node],
        "g",
        [value("x", TensorProto.FLOAT, ["N", 8]), value("c", TensorProto.BOOL, [])],
        [value("y", TensorProto.FLOAT, ["N", 4])],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)])
    numbers = counting.numbers(model, {"x": [1, 8]}, integer_operators=("MatMul",))
    assert numbers.weight_bytes == {"float32": 2 * 4 * 32}
    assert numbers.macs == 64
