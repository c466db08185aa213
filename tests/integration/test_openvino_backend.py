"""The openvino backend: what it lowers, runs, refuses and declares."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.conftest import ROOT
from tests.support.lowering import (
    Calibration,
    checked_copy,
    classifier,
    content,
    executor,
    float_answers,
    images,
    lower,
    precisions,
)

from kedge_protocol.errors import (
    ConfigError,
    InputError,
    LoweringError,
    TargetError,
    UnsupportedOperatorError,
    VerificationError,
)
from kedge_targets import registry, target
from kedge_targets.graph import model_writer
from kedge_targets.graph.rounding import sqnr_db
from kedge_targets.numerics import Plan, Precision

TARGET = "intel-cpu"


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(classifier().SerializeToString())
    return checked_copy(path, tmp_path)


def constants(entry: Path) -> dict[str, list[str]]:
    """Layer type → element types of the 4-D constants below it, from the representation."""
    root = ElementTree.fromstring(entry.read_bytes())
    found: dict[str, list[str]] = {}
    for layer in root.iter("layer"):
        data = layer.find("data")
        if layer.get("type") == "Const" and data is not None and len((data.get("shape") or "").split(",")) == 4:
            found.setdefault("Const", []).append(data.get("element_type") or "")
    return found


@pytest.mark.parametrize("precision", precisions(TARGET))
def test_each_precision_runs_near_the_float_model(graph: Path, tmp_path: Path, precision: Precision) -> None:
    before = graph.read_bytes()
    calibration = Calibration("image", images(32))
    lowered = lower(TARGET, graph, precision, calibration, tmp_path / "out")
    assert sorted(lowered.files) == ["model.bin", "model.xml"]
    samples = images(20, seed=2)
    expected = float_answers(graph, samples)
    actual = executor(TARGET, lowered)({"image": samples})["score"]
    allowed = {Precision.INT8: 0.1, Precision.FLOAT16: 2e-3, Precision.FLOAT32: 1e-5}[precision]
    assert np.abs(actual - expected).max() < allowed * np.abs(expected).max()
    assert graph.read_bytes() == before
    assert lowered.calibration_samples == (32 if precision is Precision.INT8 else 0)
    # A float file needs no samples; a look at two of them tells whether OpenVINO read the graph as it is.
    assert calibration.passes <= 1 or precision is Precision.INT8
    assert ("quantize" in lowered.seconds) == (precision is Precision.INT8)


def test_every_sample_is_used_though_nncf_would_take_300(graph: Path, tmp_path: Path) -> None:
    lowered = lower(TARGET, graph, Precision.INT8, Calibration("image", images(331)), tmp_path / "out")
    assert lowered.calibration_samples == 331


def test_int8_weights_take_one_byte(graph: Path, tmp_path: Path) -> None:
    sizes = {
        precision: lower(TARGET, graph, precision, Calibration("image", images(4)), tmp_path / precision.value)
        .files["model.bin"]
        .stat()
        .st_size
        for precision in precisions(TARGET)
    }
    assert sizes[Precision.INT8] < 0.5 * sizes[Precision.FLOAT32]
    assert sizes[Precision.FLOAT16] < 0.6 * sizes[Precision.FLOAT32]


@pytest.mark.parametrize("precision", precisions(TARGET))
def test_the_same_input_gives_the_same_bytes(graph: Path, tmp_path: Path, precision: Precision) -> None:
    first, second = (
        content(lower(TARGET, graph, precision, Calibration("image", images(16)), tmp_path / str(run)))
        for run in range(2)
    )
    assert first == second


def test_nncf_puts_its_patterns_together_once_and_looks_for_all_of_them(graph: Path, tmp_path: Path) -> None:
    lower("intel-cpu", graph, Precision.INT8, Calibration("image", images(4)), tmp_path)
    from nncf import ModelType, TargetDevice
    from nncf.common.graph.patterns.manager import PatternsManager
    from nncf.common.utils.backend import BackendType

    for kind in (None, ModelType.TRANSFORMER):
        asked = BackendType.OPENVINO, TargetDevice.CPU, kind
        kept = PatternsManager.get_full_hw_pattern_graph(*asked)
        assert PatternsManager.get_full_hw_pattern_graph(*asked) is kept
        anew = PatternsManager._get_full_pattern_graph(
            PatternsManager._get_backend_hw_patterns_map(asked[0]), TargetDevice.CPU, kind
        )
        pairs = zip(kept.get_weakly_connected_subgraphs(), anew.get_weakly_connected_subgraphs(), strict=True)
        assert all(list(mine.nodes.data()) == list(own.nodes.data()) for mine, own in pairs)
        pairs = zip(kept.get_weakly_connected_subgraphs(), anew.get_weakly_connected_subgraphs(), strict=True)
        assert all(list(mine.edges) == list(own.edges) for mine, own in pairs)


def test_the_file_holds_no_path_and_no_version(graph: Path, tmp_path: Path) -> None:
    lowered = lower(TARGET, graph, Precision.INT8, Calibration("image", images(4)), tmp_path / "out")
    raw = lowered.files["model.xml"].read_bytes()
    assert str(tmp_path).encode() not in raw
    assert lowered.tools["nncf"].encode() not in raw
    assert b"first" in raw


def test_layers_that_the_plan_keeps_stay_in_float(graph: Path, tmp_path: Path) -> None:
    plan = Plan(default=Precision.INT8, layers={"second": Precision.FLOAT32})
    lowered = lower(TARGET, graph, plan, Calibration("image", images(8)), tmp_path / "mixed")
    kinds = sorted(constants(lowered.files["model.xml"])["Const"])
    assert kinds.count("i8") == 1
    whole = lower(TARGET, graph, Precision.INT8, Calibration("image", images(8)), tmp_path / "whole")
    assert sorted(constants(whole.files["model.xml"])["Const"]).count("i8") == 2


def test_a_float_plan_with_one_int8_layer(graph: Path, tmp_path: Path) -> None:
    plan = Plan(default=Precision.FLOAT32, layers={"second": Precision.INT8})
    lowered = lower(TARGET, graph, plan, Calibration("image", images(8)), tmp_path / "out")
    assert sorted(constants(lowered.files["model.xml"])["Const"]).count("i8") == 1


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        (Plan(default=Precision.INT8, layers={"absent": Precision.FLOAT32}), "'absent'"),
        (Plan(default=Precision.INT8, layers={"second": Precision.FLOAT16}), "mixes int8 and float16"),
        (Plan(default=Precision.FLOAT16, layers={"second": Precision.FLOAT32}), "single layers"),
    ],
)
def test_a_plan_that_cannot_be_carried(graph: Path, tmp_path: Path, plan: Plan, told: str) -> None:
    with pytest.raises(LoweringError, match=told):
        lower(TARGET, graph, plan, Calibration("image", images(2)), tmp_path / "out")


def test_no_calibration_samples(graph: Path, tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match="no calibration samples"):
        lower(TARGET, graph, Precision.INT8, Calibration("image", images(0)), tmp_path / "out")


@pytest.mark.parametrize("options", [{"stream": 1}, {"model_type": "cnn"}, {"bias_correction": 1}])
def test_an_option_that_is_none(graph: Path, tmp_path: Path, options: Mapping[str, object]) -> None:
    with pytest.raises(TargetError, match=next(iter(options))):
        lower(TARGET, graph, Precision.INT8, Calibration("image", images(2)), tmp_path / "out", **options)


def test_bias_correction_is_an_option(graph: Path, tmp_path: Path) -> None:
    plain, corrected = (
        lower(
            TARGET,
            graph,
            Precision.INT8,
            Calibration("image", images(8)),
            tmp_path / str(correct),
            bias_correction=correct,
        )
        for correct in (False, True)
    )
    assert content(plain) != content(corrected)


def test_a_fixed_batch_is_kept_and_calibrated_in_its_size(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(classifier(batch=4).SerializeToString())
    lowered = lower(
        TARGET, checked_copy(path, tmp_path), Precision.INT8, Calibration("image", images(10)), tmp_path / "out"
    )
    assert lowered.calibration_samples == 10
    assert executor(TARGET, lowered)({"image": images(8)})["score"].shape == (8, 4)


def test_an_operator_that_openvino_does_not_read_is_named_with_its_node(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("Relu", ["x"], ["r"], name="before"),
            helper.make_node("Det", ["r"], ["y"], name="determinant"),
        ],
        "g",
        [value("x", TensorProto.FLOAT, [1, 3, 3])],
        [value("y", TensorProto.FLOAT, [1])],
    )
    path = tmp_path / "det.onnx"
    model_writer.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    with pytest.raises(UnsupportedOperatorError, match=r"node 'determinant': OpenVINO does not read operator 'Det'"):
        lower(TARGET, path, Precision.FLOAT32, Calibration("x", images(1)), tmp_path / "out")


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.FLOAT32])
def test_a_model_of_doubles_takes_and_gives_doubles(precision: Precision, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(rng.standard_normal(shape), name) for name, shape in (("v", (8, 8)), ("w", (8, 4)))
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "v"], ["h"], name="first"),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "w"], ["y"], name="second"),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.DOUBLE, ["N", size]) for name, size in (("x", 8), ("y", 4))]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    path = tmp_path / "doubles.onnx"
    model_writer.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    calibration = Calibration("x", rng.standard_normal((32, 8)))
    lowered = lower(TARGET, checked_copy(path, tmp_path), precision, calibration, tmp_path / "out")
    fresh = rng.standard_normal((4, 8))
    answer = executor(TARGET, lowered)({"x": fresh})["y"]
    assert (lowered.inputs[0].dtype, lowered.outputs[0].dtype) == ("float64", "float64")
    assert sqnr_db(float_answers(path, fresh), answer) > (20 if precision is Precision.INT8 else 80)


def test_several_inputs_and_outputs_keep_their_order(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Sub", ["b", "a"], ["difference"]), helper.make_node("Add", ["a", "b"], ["sum"])],
        "g",
        [value("b", TensorProto.FLOAT, ["N", 2]), value("a", TensorProto.FLOAT, ["N", 2])],
        [value("sum", TensorProto.FLOAT, ["N", 2]), value("difference", TensorProto.FLOAT, ["N", 2])],
    )
    path = tmp_path / "two.onnx"
    model_writer.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    lowered = lower(TARGET, path, Precision.FLOAT32, Calibration("a", images(1)), tmp_path / "out")
    given = {"a": np.full((3, 2), 1, np.float32), "b": np.full((3, 2), 5, np.float32)}
    answers = executor(TARGET, lowered)(given)
    assert answers["sum"].tolist() == [[6, 6]] * 3
    assert answers["difference"].tolist() == [[4, 4]] * 3


def test_processors_without_dot_products_get_seven_bits() -> None:
    (way,) = registry.compiler("openvino").quantized_for(target.find("intel-cpu"))
    assert way.reduced_range


def test_a_damaged_file_is_refused_with_the_runtimes_reason(graph: Path, tmp_path: Path) -> None:
    lowered = lower(TARGET, graph, Precision.FLOAT32, Calibration("image", images(1)), tmp_path / "out")
    entry = lowered.files["model.xml"]
    entry.write_bytes(entry.read_bytes()[:-200])
    with pytest.raises(VerificationError, match=r"model\.xml: OpenVINO \d+\.\S+ refuses the file: \w+"):
        registry.runtime("openvino").load(entry, {})


def test_missing_weights_are_refused(graph: Path, tmp_path: Path) -> None:
    lowered = lower(TARGET, graph, Precision.FLOAT32, Calibration("image", images(1)), tmp_path / "out")
    lowered.files["model.bin"].unlink()
    with pytest.raises(VerificationError):
        registry.runtime("openvino").load(lowered.files["model.xml"], {})


@pytest.mark.parametrize(
    ("options", "kernel_set"),
    [({"threads": -1}, None), ({"precision": "f8"}, None), ({"hint": 1}, None), ({}, "fast")],
)
def test_options_and_kernel_sets_that_are_none(graph: Path, options: dict[str, object], kernel_set: str | None) -> None:
    with pytest.raises(ConfigError):
        registry.runtime("openvino").load(graph, options, kernel_set=kernel_set)


def test_the_reference_kernels_differ_but_little(graph: Path, tmp_path: Path) -> None:
    lowered = lower(TARGET, graph, Precision.INT8, Calibration("image", images(16)), tmp_path / "out")
    samples = images(30, seed=5)
    runtime = registry.runtime("openvino")
    fused, reference = (
        executor(TARGET, lowered, name)({"image": samples})["score"] for name in runtime.kernel_sets[:2]
    )
    assert 0 < np.abs(fused - reference).max() < 0.1 * np.abs(fused).max()


def test_an_answer_is_not_overwritten_by_the_next_call(graph: Path, tmp_path: Path) -> None:
    lowered = lower(TARGET, graph, Precision.FLOAT32, Calibration("image", images(1)), tmp_path / "out")
    session = registry.runtime("openvino").load(lowered.files["model.xml"], lowered.runtime_options)
    assert not session.concurrent
    first = session.run([images(1, seed=1)])[0]
    kept = first.copy()
    session.run([images(1, seed=2)])
    np.testing.assert_array_equal(first, kept)
    with pytest.raises(InputError):
        session.run([np.zeros((1, 3, 8, 9, 1), np.float32)])
    session.close()
    with pytest.raises(InputError, match="closed"):
        session.run([images(1)])


def test_nothing_is_written_to_the_home_and_pytorch_is_not_imported(graph: Path, tmp_path: Path) -> None:
    """In a process of its own, with no variable set that switches the vendors' telemetry off."""
    home = tmp_path / "home"
    home.mkdir()
    script = """
import sys
from pathlib import Path
from kedge_targets.numerics import Precision
from kedge_targets import registry
from tests.support.lowering import Calibration, images, lower
lowered = lower("intel-cpu", Path(sys.argv[1]), Precision.INT8, Calibration("image", images(4)), Path(sys.argv[2]))
registry.runtime("openvino").load(lowered.files["model.xml"], {}).run([images(1)])
assert "torch" not in sys.modules, "torch was imported"
assert "openvino_telemetry" not in sys.modules, "telemetry was imported"
import torch
"""
    off = {"NNCF_CI", "NNCF_DEV", "CI", "ORT_DISABLE_TELEMETRY", "TF_BUILD", "JENKINS_URL"}
    environment = {name: value for name, value in os.environ.items() if name not in off}
    ran = subprocess.run(
        [sys.executable, "-c", script, str(graph), str(tmp_path / "out")],
        env={**environment, "HOME": str(home), "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert [str(path.relative_to(home)) for path in home.rglob("*")] == []


def test_a_float_weight_that_is_computed_from_a_constant_is_quantized(tmp_path: Path) -> None:
    model = classifier()
    kept = [node for node in model.graph.node if node.name != "last"]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    model.graph.node.extend(
        [
            helper.make_node("Transpose", ["w3"], ["w3t"], name="turned", perm=[1, 0]),
            helper.make_node("MatMul", ["f", "w3t"], ["m"], name="times"),
            helper.make_node("Add", ["m", "b3"], ["score"], name="plus"),
        ]
    )
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    onnx.checker.check_model(model)
    lowered = lower(
        TARGET, checked_copy(path, tmp_path), Precision.INT8, Calibration("image", images(8)), tmp_path / "out"
    )
    assert lowered.files["model.xml"].read_bytes().count(b'element_type="i8"') == 3
