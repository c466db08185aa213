"""The onnxruntime backend: what it lowers, runs, refuses and declares."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.support.lowering import (
    Calibration,
    checked_copy,
    classifier,
    content,
    executor,
    float_answers,
    images,
    lower,
    size,
)

from kedge_protocol.errors import ConfigError, InputError, LoweringError, TargetError, VerificationError
from kedge_targets import registry, target
from kedge_targets.graph import model_writer
from kedge_targets.numerics import Granularity, Plan, Precision, QuantizationScheme

TARGET = "generic-cpu"
PRECISIONS = registry.compiler("onnxruntime").numerics.precisions


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(classifier().SerializeToString())
    return checked_copy(path, tmp_path)


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load_model(str(path)).graph.node]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_each_precision_runs_near_the_float_model(graph: Path, tmp_path: Path, precision: Precision) -> None:
    before = graph.read_bytes()
    lowered = lower(TARGET, graph, precision, Calibration("image", images(32)), tmp_path / "out")
    samples = images(20, seed=2)
    expected = float_answers(graph, samples)
    model = executor(TARGET, lowered)
    actual = model({"image": samples})["score"]
    exact = {Precision.FLOAT16: 2e-3, Precision.FLOAT32: 1e-5}
    allowed = exact.get(precision, 0.2 if precision.weight_bits == 4 else 0.1)
    assert np.abs(actual - expected).max() < allowed * np.abs(expected).max()
    assert actual.dtype == np.float32
    assert graph.read_bytes() == before
    # Weights of 4 bits are rounded against what their layer really reads.
    looked = precision is Precision.INT8 or precision.weight_bits == 4
    assert lowered.calibration_samples == (32 if looked else 0)
    assert ("quantize" in lowered.seconds) == precision.quantized


def test_int8_weights_are_a_quarter_and_float16_weights_a_half(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    weight = numpy_helper.from_array(rng.standard_normal((64, 3, 5, 5)).astype(np.float32), "w")
    value = helper.make_tensor_value_info
    made = helper.make_graph(
        [helper.make_node("Conv", ["image", "w"], ["y"], name="conv")],
        "wide",
        [value("image", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [value("y", TensorProto.FLOAT, ["N", 64, 4, 4])],
        [weight],
    )
    path = tmp_path / "wide.onnx"
    model_writer.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)]), path)
    sizes = {
        precision: size(lower(TARGET, path, precision, Calibration("image", images(4)), tmp_path / precision.value))
        for precision in (Precision.INT8, Precision.FLOAT16, Precision.FLOAT32)
    }
    assert sizes[Precision.INT8] < 0.35 * sizes[Precision.FLOAT32]
    assert sizes[Precision.FLOAT16] < 0.55 * sizes[Precision.FLOAT32]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_same_input_gives_the_same_bytes(graph: Path, tmp_path: Path, precision: Precision) -> None:
    first, second = (
        content(lower(TARGET, graph, precision, Calibration("image", images(16)), tmp_path / str(run)))
        for run in range(2)
    )
    assert first == second


def test_the_file_holds_no_path(graph: Path, tmp_path: Path) -> None:
    lowered = lower(TARGET, graph, Precision.INT8, Calibration("image", images(4)), tmp_path / "out")
    assert str(tmp_path).encode() not in lowered.files[lowered.entry].read_bytes()


def test_layers_that_the_plan_keeps_stay_in_float(graph: Path, tmp_path: Path) -> None:
    calibration = Calibration("image", images(16))
    plan = Plan(default=Precision.INT8, layers={"second": Precision.FLOAT32, "second_relu": Precision.FLOAT32})
    mixed = onnx.load_model(str(lower(TARGET, graph, plan, calibration, tmp_path / "mixed").files["model.onnx"]))
    weights = {tensor.name: tensor.data_type for tensor in mixed.graph.initializer}
    convolutions = [node for node in mixed.graph.node if node.op_type == "Conv"]
    assert weights.get(convolutions[1].input[1]) == TensorProto.FLOAT
    assert convolutions[0].input[1] not in weights


def test_a_float_plan_with_one_int8_layer(graph: Path, tmp_path: Path) -> None:
    plan = Plan(default=Precision.FLOAT32, layers={"second": Precision.INT8})
    lowered = lower(TARGET, graph, plan, Calibration("image", images(16)), tmp_path / "out")
    model = onnx.load_model(str(lowered.files["model.onnx"]))
    kinds = [tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) == 4]
    assert sorted(kinds) == [TensorProto.FLOAT, TensorProto.INT8]


def test_a_plan_for_a_layer_that_is_fused_away_holds_for_the_fusion(tmp_path: Path) -> None:
    model = classifier()
    ones, zeros = np.ones(8, np.float32), np.zeros(8, np.float32)
    for name, values in (("scale", ones), ("shift", zeros), ("mean", zeros), ("variance", ones)):
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    model.graph.node.insert(
        1, helper.make_node("BatchNormalization", ["c1", "scale", "shift", "mean", "variance"], ["n1"], name="norm")
    )
    model.graph.node[2].input[0] = "n1"
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    plan = Plan(default=Precision.INT8, layers={"norm": Precision.FLOAT32})
    lowered = lower(TARGET, checked_copy(path, tmp_path), plan, Calibration("image", images(8)), tmp_path / "out")
    made = onnx.load_model(str(lowered.files["model.onnx"]))
    kinds = [tensor.data_type for tensor in made.graph.initializer if len(tensor.dims) == 4]
    assert sorted(kinds) == [TensorProto.FLOAT, TensorProto.INT8]
    assert "BatchNormalization" not in operators(lowered.files["model.onnx"])


def test_the_plan_chooses_the_way_of_int8(graph: Path, tmp_path: Path) -> None:
    per_tensor = QuantizationScheme(
        activation="int8", weight="int8", symmetric_activation=True, granularity=Granularity.PER_TENSOR
    )
    plan = Plan(default=Precision.INT8, scheme=per_tensor)
    lowered = lower(TARGET, graph, plan, Calibration("image", images(8)), tmp_path / "out")
    made = onnx.load_model(str(lowered.files["model.onnx"])).graph
    tensors = {tensor.name: tensor for tensor in made.initializer}
    (zero,) = (node.input[2] for node in made.node if node.op_type == "QuantizeLinear" and node.input[0] == "image")
    assert tensors[zero].data_type == TensorProto.INT8
    assert numpy_helper.to_array(tensors[zero]) == 0
    scales = [node.input[1] for node in made.node if node.op_type == "DequantizeLinear"]
    assert {numpy_helper.to_array(tensors[scale]).size for scale in scales} == {1}


@pytest.mark.parametrize(
    ("layers", "told"),
    [({"absent": Precision.FLOAT32}, "'absent'"), ({"second": Precision.FLOAT16}, "mixes int8 and float16")],
)
def test_a_plan_that_cannot_be_carried(graph: Path, tmp_path: Path, layers: dict[str, Precision], told: str) -> None:
    plan = Plan(default=Precision.INT8, layers=layers)
    with pytest.raises(LoweringError, match=told):
        lower(TARGET, graph, plan, Calibration("image", images(2)), tmp_path / "out")


def test_no_calibration_samples(graph: Path, tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match="no calibration samples"):
        lower(TARGET, graph, Precision.INT8, Calibration("image", images(0)), tmp_path / "out")


@pytest.mark.parametrize("options", [{"threds": 1}, {"calibration": "entropy"}])
def test_an_option_that_is_none(graph: Path, tmp_path: Path, options: dict[str, object]) -> None:
    with pytest.raises(TargetError, match=next(reversed(options))):
        lower(TARGET, graph, Precision.INT8, Calibration("image", images(2)), tmp_path / "out", **options)


def test_a_fixed_batch_is_kept_and_calibrated_in_its_size(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(classifier(batch=4).SerializeToString())
    lowered = lower(
        TARGET, checked_copy(path, tmp_path), Precision.INT8, Calibration("image", images(10)), tmp_path / "out"
    )
    assert lowered.inputs[0].file.shape == (4, 3, 8, 8)
    assert lowered.calibration_samples == 10
    assert executor(TARGET, lowered)({"image": images(8)})["score"].shape == (8, 4)


def test_answers_are_not_cut_off_at_what_calibration_saw(graph: Path, tmp_path: Path) -> None:
    lowered = lower(TARGET, graph, Precision.INT8, Calibration("image", images(4) * 0.1), tmp_path / "out")
    model = onnx.load_model(str(lowered.files["model.onnx"]))
    assert [node.op_type for node in model.graph.node if "score" in node.output] == ["Gemm"]


def test_an_old_opset_is_lowered(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(classifier(opset=9, ir_version=4).SerializeToString())
    lowered = lower(
        TARGET, checked_copy(path, tmp_path), Precision.INT8, Calibration("image", images(4)), tmp_path / "out"
    )
    assert executor(TARGET, lowered)({"image": images(2)})["score"].shape == (2, 4)


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.FLOAT32])
def test_a_new_opset_with_the_same_operators_is_lowered_for_an_older_runtime(
    precision: Precision, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(classifier(opset=23, ir_version=11).SerializeToString())
    samples = Calibration("image", images(4))
    lowered = lower(TARGET, checked_copy(path, tmp_path), precision, samples, tmp_path / "out")
    assert [one.minimum for one in lowered.runtimes] == ["1.20"]
    made = onnx.load_model(str(lowered.files["model.onnx"]))
    assert (made.opset_import[0].version, made.ir_version) == (21, 10)
    assert executor(TARGET, lowered)({"image": images(2)})["score"].shape == (2, 4)


def test_an_opset_that_the_target_cannot_run_is_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = classifier(opset=23, ir_version=11)
    score, last = helper.make_tensor_value_info("normed", TensorProto.FLOAT, ["N", 4]), model.graph.node[-1]
    model.graph.node.append(helper.make_node("RMSNormalization", [last.output[0], "g"], ["normed"], name="norm"))
    model.graph.initializer.append(numpy_helper.from_array(np.ones(4, np.float32), "g"))
    model.graph.output.append(score)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(LoweringError, match=r"opset 23 needs ONNX Runtime 1\.23, target generic-cpu has 1\.20"):
        lower(TARGET, checked_copy(path, tmp_path), Precision.FLOAT32, Calibration("image", images(1)), tmp_path / "o")


def test_processors_without_dot_products_get_seven_bits() -> None:
    compiler = registry.compiler("onnxruntime")
    (way,) = compiler.quantized_for(target.find("generic-cpu"))
    assert way.reduced_range
    vnni = target.Target(
        name="new",
        title="new",
        processor=target.Processor(architecture="x86_64", instruction_sets=("avx512_vnni",)),
        system=target.System(os="Linux", memory_bytes=1),
        backends=(target.BackendChoice(name="onnxruntime"),),
    )
    assert not compiler.quantized_for(vnni)[0].reduced_range


def test_a_damaged_file_is_refused_with_the_runtimes_reason(graph: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(graph.read_bytes()[:-300])
    with pytest.raises(VerificationError, match=r"bad\.onnx: ONNX Runtime \d+\.\S+ refuses the file: \w+"):
        registry.runtime("onnxruntime").load(bad, {})


@pytest.mark.parametrize(
    ("options", "kernel_set"),
    [({"threads": -1}, None), ({"threads": "2"}, None), ({"spin": 1}, None), ({"thread": 1}, None), ({}, "fast")],
)
def test_options_and_kernel_sets_that_are_none(graph: Path, options: dict[str, object], kernel_set: str | None) -> None:
    with pytest.raises(ConfigError):
        registry.runtime("onnxruntime").load(graph, options, kernel_set=kernel_set)


def test_the_reference_kernels_differ_but_little(graph: Path, tmp_path: Path) -> None:
    lowered = lower(TARGET, graph, Precision.INT8, Calibration("image", images(16)), tmp_path / "out")
    samples = images(30, seed=5)
    runtime = registry.runtime("onnxruntime")
    fused, reference = (executor(TARGET, lowered, name)({"image": samples})["score"] for name in runtime.kernel_sets)
    assert 0 < np.abs(fused - reference).max() < 0.1 * np.abs(fused).max()


def test_arrays_that_the_model_does_not_take(graph: Path) -> None:
    session = registry.runtime("onnxruntime").load(graph, {"threads": 1})
    with pytest.raises(InputError):
        session.run([np.zeros((1, 3, 8, 9), np.float32)])
    session.close()
    with pytest.raises(InputError, match="closed"):
        session.run([images(1)])


def test_several_threads_may_call_one_session(graph: Path) -> None:
    session = registry.runtime("onnxruntime").load(graph, {"threads": 1})
    assert session.concurrent
    samples = images(64)
    expected = float_answers(graph, samples)
    answers: dict[int, np.ndarray] = {}

    def work(index: int) -> None:
        for _ in range(20):
            answers[index] = session.run([samples[index : index + 1]])[0]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, answer in answers.items():
        np.testing.assert_allclose(answer[0], expected[index], rtol=1e-5, atol=1e-6)
    assert len(answers) == 8
