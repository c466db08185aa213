"""Lowering for TensorRT: what the graphs hold, how near they are to the float model, and what is refused beforehand."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.support.lowering import (
    Calibration,
    Case,
    checked_copy,
    classifier,
    content,
    executor,
    float_answers,
    ic,
    images,
    kws,
    lower,
    top1,
)
from tests.support.mobile_network import mobile_network, pictures

from kedge_protocol.bundle.config import Verified
from kedge_protocol.errors import LoweringError, TargetError, ToolchainError, UnsupportedOperatorError
from kedge_targets import registry, target
from kedge_targets.backends.tensorrt import recipe
from kedge_targets.backends.tensorrt.recipe import FP16, INT8
from kedge_targets.contract import Lowered
from kedge_targets.graph import model_writer
from kedge_targets.numerics import Granularity, Plan, Precision, QuantizationScheme

pytestmark = pytest.mark.usefixtures("tensorrt_toolchain")

Array = npt.NDArray[Any]
TARGET = "jetson-orin-nano"


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(classifier().SerializeToString())
    return checked_copy(path, tmp_path)


@pytest.fixture
def mobile(tmp_path: Path) -> Path:
    path = tmp_path / "mobile.onnx"
    path.write_bytes(mobile_network().SerializeToString())
    return checked_copy(path, tmp_path)


def opened(lowered: Lowered, precision: str) -> onnx.ModelProto:
    return onnx.load_model(str(lowered.files[recipe.FILES[precision]]))


def constants(model: onnx.ModelProto) -> dict[str, Array]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def makers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {tensor: node for node in model.graph.node for tensor in node.output}


def test_the_bundle_has_two_graphs_and_a_recipe_and_no_engine(graph: Path, tmp_path: Path) -> None:
    before = graph.read_bytes()
    lowered = lower(TARGET, graph, Precision.INT8, Calibration("image", images(16)), tmp_path / "out")
    assert set(lowered.files) == {"model_int8_qdq.onnx", "model_fp16.onnx", "recipe.json"}
    assert lowered.entry == "recipe.json"
    written = recipe.read(lowered.files["recipe.json"])
    assert written.precisions == (INT8, FP16)
    assert written.static
    assert written.inputs[0].maximum == (1, 3, 8, 8)
    assert written.outputs == ("score",)
    assert written.workspace_bytes == target.find(TARGET).system.memory_bytes // 8
    assert written.lines == recipe.LINES
    assert lowered.verified is Verified.CHECKED
    assert lowered.calibration_samples == 16
    assert (lowered.runtimes[0].distribution, lowered.runtimes[0].minimum) == ("tensorrt", "8.6")
    assert "1.7.1.116" in lowered.tools.values()
    assert graph.read_bytes() == before


def test_quantization_is_symmetric_per_channel_and_leaves_biases_in_float(mobile: Path, tmp_path: Path) -> None:
    model = opened(lower(TARGET, mobile, Precision.INT8, Calibration("image", pictures(8)), tmp_path / "out"), INT8)
    values, maker = constants(model), makers(model)
    pairs = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert pairs
    for node in pairs:
        zero = values[node.input[2]]
        assert zero.dtype == np.int8
        assert not zero.any()
    weighted = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(weighted) == 20
    for node in weighted:
        activation, weight = maker[node.input[0]], maker[node.input[1]]
        assert activation.op_type == weight.op_type == "DequantizeLinear"
        float_weight = values[maker[weight.input[0]].input[0]]
        assert values[activation.input[1]].size == 1
        assert values[weight.input[1]].shape == (float_weight.shape[0],)
        if len(node.input) > 2:
            assert values[node.input[2]].dtype == np.float32


def test_nothing_stands_between_a_layer_and_what_is_fused_into_it(mobile: Path, tmp_path: Path) -> None:
    """No pair after a convolution whose activation follows; of a sum's branches the convolution's comes in float."""
    model = opened(lower(TARGET, mobile, Precision.INT8, Calibration("image", pictures(8)), tmp_path / "out"), INT8)
    maker = makers(model)
    clips = [node for node in model.graph.node if node.op_type == "Clip"]
    assert clips
    assert all(maker[node.input[0]].op_type == "Conv" for node in clips)
    sums = [node for node in model.graph.node if node.op_type == "Add"]
    assert len(sums) == 3
    for node in sums:
        assert sorted(maker[tensor].op_type for tensor in node.input) == ["Conv", "DequantizeLinear"]


@pytest.mark.shared_data
def test_of_two_convolutions_in_a_sum_the_longer_branch_is_free(shared_data: Path, tmp_path: Path) -> None:
    case = ic(shared_data)
    lowered = lower(
        TARGET,
        checked_copy(case.model, tmp_path),
        Precision.INT8,
        Calibration("input", case.calibration),
        tmp_path / "o",
    )
    model = opened(lowered, INT8)
    maker = makers(model)
    free = [maker[t].name for node in model.graph.node if node.op_type == "Add" for t in node.input]
    assert [name for name in free if name.startswith("Conv")] == ["Conv_12", "Conv_21", "Conv_33"]


def test_the_fp16_graph_computes_in_half_and_speaks_float(mobile: Path, tmp_path: Path) -> None:
    lowered = lower(TARGET, mobile, Precision.INT8, Calibration("image", pictures(8)), tmp_path / "out")
    model = opened(lowered, FP16)
    assert {value.dtype for value in constants(model).values()} == {np.dtype(np.float16)}
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.elem_type == TensorProto.FLOAT
    assert lowered.files["model_fp16.onnx"].stat().st_size < 0.65 * lowered.files["model_int8_qdq.onnx"].stat().st_size


def test_a_float16_plan_offers_fp16_alone_under_every_kernel_set(graph: Path, tmp_path: Path) -> None:
    lowered = lower(TARGET, graph, Precision.FLOAT16, Calibration("image", images(4)), tmp_path / "out")
    assert set(lowered.files) == {"model_fp16.onnx", "recipe.json"}
    assert recipe.read(lowered.files["recipe.json"]).precisions == (FP16,)
    assert lowered.calibration_samples == 0
    samples = images(6, seed=3)
    answers = [
        executor(TARGET, lowered, kernel_set)({"image": samples})["score"]
        for kernel_set in registry.runtime("tensorrt").kernel_sets
    ]
    np.testing.assert_array_equal(answers[0], answers[1])
    # The third leaves the tolerance room for kernels that sum in half precision.
    assert 0 < np.abs(answers[2] - answers[0]).max() < 0.02
    np.testing.assert_allclose(answers[0], float_answers(graph, samples), atol=0.02)


@pytest.mark.parametrize("kernel_set", [INT8, FP16])
def test_both_graphs_are_near_the_float_model(mobile: Path, tmp_path: Path, kernel_set: str) -> None:
    lowered = lower(TARGET, mobile, Precision.INT8, Calibration("image", pictures(64)), tmp_path / "out")
    samples = pictures(64, seed=2)
    expected = float_answers(mobile, samples)
    actual = executor(TARGET, lowered, kernel_set)({"image": samples})["score"]
    allowed = {INT8: 0.15, FP16: 0.01}[kernel_set]
    assert np.abs(actual - expected).max() < allowed * np.abs(expected).max()


def _mnist(shared_data: Path) -> Case:
    with np.load(shared_data / "eval" / "mnist_t10k_uint8.npz") as data:
        samples, labels = data["input"][:2200].astype(np.float32), data["label"][:2200].astype(int)
    return Case(shared_data / "models" / "mnist_cnn.onnx", samples[:200], samples[200:], labels[200:])


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("case", "name", "drop", "agreement"),
    [
        pytest.param(ic, "input", 0.015, 0.93, id="ic_resnet8"),
        pytest.param(kws, "input", 0.01, 0.95, id="kws_dscnn"),
        pytest.param(_mnist, "Input3", 0.01, 0.99, id="mnist_cnn"),
    ],
)
def test_int8_by_onnx_runtime_keeps_the_answers(
    shared_data: Path, tmp_path: Path, case: Callable[[Path], Case], name: str, drop: float, agreement: float
) -> None:
    given = case(shared_data)
    graph = checked_copy(given.model, tmp_path)
    lowered = lower(TARGET, graph, Precision.INT8, Calibration(name, given.calibration), tmp_path / "out")
    one_a_time = onnx.load_model(str(graph)).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    expected = (
        np.concatenate([float_answers(graph, sample[None]) for sample in given.evaluation[:500]])
        if one_a_time
        else float_answers(graph, given.evaluation)
    )
    count = len(expected)
    for kernel_set, allowed, least in ((INT8, drop, agreement), (FP16, 0.002, 0.998)):
        answers = executor(TARGET, lowered, kernel_set)({name: given.evaluation[:count]})
        actual = next(iter(answers.values()))
        assert top1(actual, given.labels[:count]) >= top1(expected, given.labels[:count]) - allowed
        assert (actual.argmax(1) == expected.argmax(1)).mean() >= least


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.FLOAT16])
def test_the_same_input_gives_the_same_bytes(graph: Path, tmp_path: Path, precision: Precision) -> None:
    first, second = (
        content(lower(TARGET, graph, precision, Calibration("image", images(8)), tmp_path / str(run)))
        for run in range(2)
    )
    assert first == second
    assert not any(str(tmp_path).encode() in raw for raw in first.values())


def test_layers_that_the_plan_keeps_stay_in_float_in_both_graphs(graph: Path, tmp_path: Path) -> None:
    plan = Plan(default=Precision.INT8, layers={"second": Precision.FLOAT32, "second_relu": Precision.FLOAT32})
    lowered = lower(TARGET, graph, plan, Calibration("image", images(8)), tmp_path / "out")
    maker = makers(opened(lowered, INT8))
    second = next(node for node in opened(lowered, INT8).graph.node if node.name == "second")
    assert maker[second.input[0]].op_type == "Relu"
    assert second.input[1] in constants(opened(lowered, INT8))
    half = {node.name: node for node in opened(lowered, FP16).graph.node}
    kinds = constants(opened(lowered, FP16))
    assert kinds[half["second"].input[1]].dtype == np.float32
    assert kinds[half["first"].input[1]].dtype == np.float16
    assert any("1 of 3 weighted layers stay in float: second" in note for note in lowered.notes)


def test_operators_that_stop_fusion_are_notes(tmp_path: Path) -> None:
    model = classifier()
    model.graph.node.insert(1, helper.make_node("Softplus", ["c1"], ["s1"], name="soft"))
    model.graph.node[2].input[0] = "s1"
    model.graph.node[2].op_type = "Softsign"
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    lowered = lower(
        TARGET, checked_copy(path, tmp_path), Precision.INT8, Calibration("image", images(8)), tmp_path / "out"
    )
    assert any("compute in float and stop their fusion: Softsign" in note for note in lowered.notes)


def test_the_batch_is_fixed_as_the_target_says_or_left_free(graph: Path, tmp_path: Path) -> None:
    calibration = Calibration("image", images(10))
    fixed = lower(TARGET, graph, Precision.INT8, calibration, tmp_path / "fixed", batch=4)
    assert recipe.read(fixed.files["recipe.json"]).inputs[0].minimum == (4, 3, 8, 8)
    assert (fixed.inputs[0].shape, fixed.inputs[0].file.shape) == ((None, 3, 8, 8), (4, 3, 8, 8))
    assert executor(TARGET, fixed)({"image": images(8)})["score"].shape == (8, 4)
    free = lower(TARGET, graph, Precision.INT8, calibration, tmp_path / "free", max_batch=8)
    (profile,) = recipe.read(free.files["recipe.json"]).inputs
    assert (profile.minimum[0], profile.optimum[0], profile.maximum[0]) == (1, 1, 8)
    assert executor(TARGET, free)({"image": images(5)})["score"].shape == (5, 4)


def sequence(length: int | str) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    weight = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    made = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["m"], name="product"),
            helper.make_node("Relu", ["m"], ["y"], name="r"),
        ],
        "sequence",
        [value("x", TensorProto.FLOAT, ["N", length, 8])],
        [value("y", TensorProto.FLOAT, ["N", length, 8])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


class Lengths:
    """Samples of several lengths."""

    def __init__(self, *lengths: int) -> None:
        self._lengths = lengths

    @property
    def samples(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Any:
        for seed, length in enumerate(self._lengths):
            yield {"x": np.random.default_rng(seed).standard_normal((1, length, 8)).astype(np.float32)}


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.FLOAT16])
def test_a_free_length_goes_from_the_shortest_sample_to_the_longest(tmp_path: Path, precision: Precision) -> None:
    path = tmp_path / "sequence.onnx"
    model_writer.save(sequence("L"), path)
    lowered = lower(TARGET, path, precision, Lengths(4, 16, 9), tmp_path / "out")
    (profile,) = recipe.read(lowered.files["recipe.json"]).inputs
    assert (profile.minimum, profile.optimum, profile.maximum) == ((1, 4, 8), (1, 16, 8), (1, 16, 8))


def test_a_free_length_without_samples(tmp_path: Path) -> None:
    path = tmp_path / "sequence.onnx"
    model_writer.save(sequence("L"), path)
    with pytest.raises(LoweringError, match=r"input 'x': axis 1 is free"):
        lower(TARGET, path, Precision.FLOAT16, Lengths(), tmp_path / "out")


def test_an_operator_that_no_tensorrt_has_is_named_before_anything_is_quantized(tmp_path: Path) -> None:
    model = sequence(8)
    model.graph.node[1].op_type = "Det"
    model.graph.output[0].type.tensor_type.shape.dim.pop()
    model.graph.output[0].type.tensor_type.shape.dim.pop()
    path = tmp_path / "det.onnx"
    model_writer.save(model, path)
    with pytest.raises(UnsupportedOperatorError, match=r"det\.onnx: node 'r': TensorRT's parser .* operator Det"):
        lower(TARGET, path, Precision.INT8, Lengths(8), tmp_path / "out")


def test_what_only_the_parser_knows_is_refused_by_node_before_anything_ships(tmp_path: Path) -> None:
    """A MaxPool whose indices are used: the table has MaxPool, the parser does not take this one."""
    value = helper.make_tensor_value_info
    made = helper.make_graph(
        [helper.make_node("MaxPool", ["x"], ["y", "i"], name="pool", kernel_shape=[2, 2])],
        "pool",
        [value("x", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [value("y", TensorProto.FLOAT, ["N", 3, 7, 7]), value("i", TensorProto.INT64, ["N", 3, 7, 7])],
    )
    path = tmp_path / "pool.onnx"
    model_writer.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    with pytest.raises(
        UnsupportedOperatorError, match=r"model_fp16\.onnx: node 'pool': TensorRT refuses operator MaxPool"
    ):
        lower(TARGET, path, Precision.FLOAT16, Calibration("x", images(2)), tmp_path / "out")


def test_an_opset_that_the_targets_tensorrt_does_not_take(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(classifier(opset=21, ir_version=10).SerializeToString())
    with pytest.raises(LoweringError, match=r"opset 21 needs TensorRT 10\.15, the target has 10\.3"):
        lower(TARGET, checked_copy(path, tmp_path), Precision.INT8, Calibration("image", images(2)), tmp_path / "out")


def test_a_newer_opset_needs_a_newer_tensorrt_and_the_bundle_says_so(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(classifier(opset=20, ir_version=9).SerializeToString())
    lowered = lower(
        TARGET, checked_copy(path, tmp_path), Precision.INT8, Calibration("image", images(2)), tmp_path / "out"
    )
    assert (lowered.runtimes[0].distribution, lowered.runtimes[0].minimum) == ("tensorrt", "10.0")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"batsch": 1}, "batsch"),
        ({"batch": 0}, "batch = 0"),
        ({"workspace_mib": True}, "workspace_mib = True"),
        ({"build_seconds": "long"}, "build_seconds = 'long'"),
        ({"batch": 1, "max_batch": 2}, "both batch and max_batch"),
    ],
)
def test_an_option_that_is_none(graph: Path, tmp_path: Path, options: dict[str, Any], told: str) -> None:
    with pytest.raises(TargetError, match=told):
        lower(TARGET, graph, Precision.INT8, Calibration("image", images(2)), tmp_path / "out", **options)


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        (Plan(default=Precision.FLOAT32), "int8 or float16"),
        (Plan(default=Precision.INT8, layers={"absent": Precision.FLOAT32}), "'absent'"),
        (
            Plan(
                default=Precision.INT8,
                scheme=QuantizationScheme(
                    activation="uint8", weight="int8", symmetric_activation=False, granularity=Granularity.PER_CHANNEL
                ),
            ),
            "cannot quantize so",
        ),
    ],
)
def test_a_plan_that_cannot_be_carried(graph: Path, tmp_path: Path, plan: Plan, told: str) -> None:
    with pytest.raises(LoweringError, match=told):
        lower(TARGET, graph, plan, Calibration("image", images(2)), tmp_path / "out")


def test_no_calibration_samples(graph: Path, tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match="no calibration samples"):
        lower(TARGET, graph, Precision.INT8, Calibration("image", images(0)), tmp_path / "out")


def test_a_target_that_does_not_say_which_tensorrt_it_has(graph: Path, tmp_path: Path) -> None:
    device = replace(target.find(TARGET), runtimes={})
    with pytest.raises(TargetError, match=r'tensorrt = "10\.3"'):
        registry.compiler("tensorrt").lower(
            graph,
            Plan(default=Precision.INT8),
            Calibration("image", images(2)),
            target=device,
            options={},
            workdir=tmp_path,
        )


def test_without_the_toolchain_nothing_is_made_and_the_command_is_told(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEDGE_DATA", str(tmp_path / "empty"))
    assert "kedge toolchain install tensorrt" in str(registry.compiler("tensorrt").missing())
    out = tmp_path / "out"
    with pytest.raises(ToolchainError, match="kedge toolchain install tensorrt"):
        lower(TARGET, graph, Precision.INT8, Calibration("image", images(2)), out)
    assert not list(out.iterdir())
    shutil.rmtree(out)
