"""int8 of graphs in odd forms: every output stands by itself, against float."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper
from tests.support import other_processor
from tests.support.lowering import checked_copy, executor, lower
from tests.support.odd_graphs import ODD, Odd, Samples, node, odd, random, resized

from kedge_protocol.errors import LoweringError, UnsupportedOperatorError
from kedge_targets.graph import output_guard
from kedge_targets.graph.rounding import sqnr_db
from kedge_targets.numerics import Plan, Precision

HEALTHY = 20.0
"""dB; int8 of graphs of this size has 28 to 45."""


def noise(odd: Odd, target: str, folder: Path) -> dict[str, float]:
    """Output → dB of the lowered file against the float model, on fresh samples."""
    path = folder / "model.onnx"
    onnx.save(odd.model, path)
    # TFLite cuts answers too at what calibration saw; 32 samples do not show their ends.
    samples = Samples(odd, 256 if target == "rpi4" else 32)
    lowered = lower(target, checked_copy(path, folder), Precision.INT8, samples, folder / "out")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    fresh = odd.samples(1 if odd.shape[0] == 1 else 3, seed=9)
    names = [one.name for one in session.get_outputs()]
    expected = dict(zip(names, session.run(None, {odd.input: fresh}), strict=True))
    made = executor(target, lowered)({odd.input: fresh})
    return {name: sqnr_db(expected[name], made[name]) for name in names}


@pytest.mark.parametrize("target", ["generic-cpu", "intel-cpu"])
@pytest.mark.parametrize("name", ODD)
def test_every_output_is_right(name: str, target: str, tmp_path: Path) -> None:
    found = noise(ODD[name](), target, tmp_path)
    assert min(found.values()) > HEALTHY, found


_FORMS = ("branches", "tied matrix", "gathered by places", "turned by lengths")
"""One of each kind that TFLite's converters take in their own ways; the others are in ``make campaign``."""
_LOOPS = ("loop", "loop from outside")
"""TFLite's quantizer takes no graphs within the graph but the branches of an If."""


@pytest.mark.usefixtures("tflite_toolchain")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in _FORMS else pytest.mark.campaign) for name in ODD if name not in _LOOPS],
)
def test_every_output_is_right_on_a_raspberry_pi(name: str, tmp_path: Path) -> None:
    found = noise(ODD[name](), "rpi4", tmp_path)
    assert min(found.values()) > HEALTHY, found


@pytest.mark.usefixtures("tflite_toolchain")
def test_a_loop_is_refused_by_its_node_on_a_raspberry_pi(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOperatorError, match="operator Loop cannot be converted") as refused:
        noise(ODD["loop"](), "rpi4", tmp_path)
    assert refused.value.where == "node 'Loop_z'"
    assert refused.value.remedy


@pytest.mark.parametrize("target", ["generic-cpu", "intel-cpu"])
def test_a_cubic_resize_is_not_cut_at_the_range_of_its_input(target: str, tmp_path: Path) -> None:
    found = noise(resized(2.0, mode="cubic", cubic_coeff_a=-0.75), target, tmp_path)
    assert found["y"] > 30, found


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.FLOAT32])
def test_what_a_runtime_computes_otherwise_in_float_is_refused_by_its_node(
    precision: Precision, tmp_path: Path
) -> None:
    odd = resized(0.5, mode="linear", antialias=1)
    path = tmp_path / "model.onnx"
    onnx.save(odd.model, path)
    with pytest.raises(UnsupportedOperatorError, match="does not compute operator 'Resize' as ONNX Runtime") as refused:
        lower("intel-cpu", checked_copy(path, tmp_path), precision, Samples(odd, 8), tmp_path / "out")
    assert refused.value.where == "node 'Resize_r'"
    assert refused.value.remedy


def test_no_sample_takes_another_branch_within_a_branch(tmp_path: Path) -> None:
    odd = ODD["branches within branches"]()
    path = tmp_path / "model.onnx"
    onnx.save(odd.model, path)
    plan = Plan(default=Precision.INT8, guard=True)
    lowered = lower("intel-cpu", checked_copy(path, tmp_path), plan, Samples(odd, 32), tmp_path / "out")
    fresh = odd.samples(64, seed=9)
    session, run = onnxruntime.InferenceSession(str(path)), executor("intel-cpu", lowered)
    noises = [sqnr_db(session.run(["y"], {"x": one[None]})[0], run({"x": one[None]})["y"]) for one in fresh]
    assert min(noises) > HEALTHY, noises


def test_layers_are_ranked_in_an_old_opset_too(tmp_path: Path) -> None:
    # A DequantizeLinear takes a scale for each channel from opset 13 on.
    odd = ODD["softmax over axes"]()
    onnx.save(odd.model, tmp_path / "model.onnx")
    given = onnx.load(checked_copy(tmp_path / "model.onnx", tmp_path))
    feeds = output_guard.few(given, Samples(odd, 16))
    made = output_guard.simulated(given, Samples(odd, 16))
    assert not output_guard.weak(*(output_guard.answers(one, feeds, ["y"]) for one in (given, made)))
    assert output_guard.noisiest(given, made, feeds, ["y"])[0] == "Gemm_h"


def test_what_cannot_be_read_or_run_is_refused_by_its_node_and_why(tmp_path: Path) -> None:
    parts = [
        node("SplitToSequence", ["x", "four"], ["parts"], axis=1),
        node("ConcatFromSequence", ["parts"], ["rows"], axis=0),
        node("ReduceMean", ["rows"], ["y"], axes=[0], keepdims=0),
    ]
    gates = [
        node("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
        node("LSTM", ["t", "W", "R"], ["", "h"], hidden_size=4, activations=["HardSigmoid", "Tanh", "Tanh"]),
        node("Squeeze", ["h", "zero"], ["y"]),
    ]
    cases = {
        "ConcatFromSequence_rows": odd(parts, {"y": (4,)}, {"four": np.array([4, 4])}, shape=("N", 8)),
        "LSTM_": odd(
            gates,
            {"y": ("N", 4)},
            {"W": random(1, 16, 3), "R": random(1, 16, 4), "zero": np.array([0])},
            shape=("N", 5, 3),
        ),
    }
    for name, case in cases.items():
        path = tmp_path / f"{name}.onnx"
        onnx.save(case.model, path)
        with pytest.raises(UnsupportedOperatorError, match=name.split("_")[0]) as refused:
            lower("intel-cpu", checked_copy(path, tmp_path), Precision.FLOAT32, Samples(case, 4), tmp_path / name)
        assert refused.value.where == f"node {name!r}"
        assert refused.value.remedy


@pytest.mark.usefixtures("tflite_toolchain")
def test_what_onnx2tf_mistakes_and_no_other_converts_is_refused_by_its_node(tmp_path: Path) -> None:
    nodes = [
        node("Conv", ["x", "w"], ["a"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        node("ScatterND", ["a", "places", "values"], ["y"], reduction="add"),
    ]
    weights = {"w": random(4, 3, 3, 3), "places": np.array([[0, 3], [0, 1]]), "values": random(2, 8, 8)}
    with pytest.raises(LoweringError, match="the operator ScatterND cannot be converted") as refused:
        noise(odd(nodes, {"y": (1, 4, 8, 8)}, weights, shape=(1, 3, 8, 8)), "rpi4", tmp_path)
    assert refused.value.where == "node 'ScatterND_y'"
    assert refused.value.remedy


@pytest.mark.usefixtures("tflite_toolchain")
def test_what_tensorflow_refuses_without_a_name_is_found_by_its_node(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOperatorError, match=r"no operator tf\.ResizeBicubic for Resize") as refused:
        noise(resized(2.0, mode="cubic"), "rpi4", tmp_path)
    assert refused.value.where == "node 'Resize_r'"
    assert refused.value.remedy


@pytest.mark.usefixtures("tflite_toolchain")
def test_layers_whose_scales_xnnpack_refuses_stay_in_float(tmp_path: Path) -> None:
    wild = resized(2.0, mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor")
    first, second = (numpy_helper.to_array(one).copy() for one in list(wild.model.graph.initializer)[1:])
    for channel, factor in ((1, 1e3), (2, 1e-4)):
        first[channel] *= factor
        second[:, channel] /= factor
    for tensor, value in zip(list(wild.model.graph.initializer)[1:], (first, second), strict=True):
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    path = tmp_path / "model.onnx"
    onnx.save(wild.model, path)
    plan = Plan(default=Precision.INT8, guard=True)
    lowered = lower("rpi4", checked_copy(path, tmp_path), plan, Samples(wild, 32), tmp_path / "out")
    fresh = wild.samples(3, seed=9)
    expected = onnxruntime.InferenceSession(str(path)).run(None, {"x": fresh})[0]
    assert sqnr_db(expected, executor("rpi4", lowered)({"x": fresh})["y"]) > HEALTHY
    assert lowered.floating


@pytest.mark.usefixtures("tensorrt_toolchain")
@pytest.mark.parametrize("name", ["bias is one number", "stacked matrices", "tied matrix", "clashing names"])
def test_every_output_is_right_on_a_jetson(name: str, tmp_path: Path) -> None:
    found = noise(ODD[name](), "jetson-orin-nano", tmp_path)
    assert min(found.values()) > HEALTHY, found


def test_boxes_do_not_take_the_scores_steps(tmp_path: Path) -> None:
    odd = ODD["boxes beside scores"]()
    path = tmp_path / "model.onnx"
    onnx.save(odd.model, path)
    lowered = lower("generic-cpu", checked_copy(path, tmp_path), Precision.INT8, Samples(odd, 32), tmp_path / "out")
    fresh = odd.samples(8, seed=9)
    expected = onnxruntime.InferenceSession(str(path)).run(None, {"x": fresh})[0][:, 4:]
    assert sqnr_db(expected, executor("generic-cpu", lowered)({"x": fresh})["y"][:, 4:]) > 30


@pytest.mark.parametrize("name", [name for name in ODD if name.startswith("weights of")])
def test_weights_that_are_stored_small_become_integers(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    odd = ODD[name]()
    onnx.save(odd.model, path)
    lowered = lower("generic-cpu", checked_copy(path, tmp_path), Precision.INT8, Samples(odd, 8), tmp_path / "out")
    made = onnx.load(lowered.files[lowered.entry])
    kinds = {one.data_type for one in made.graph.initializer if np.prod(one.dims) > 100}
    assert kinds == {TensorProto.INT8}


@pytest.mark.needs(other_processor.QEMU)
def test_a_convolution_without_bias_answers_without_vnni_too(tmp_path: Path) -> None:
    odd = ODD["own function"]()
    path = tmp_path / "model.onnx"
    onnx.save(odd.model, path)
    lowered = lower("intel-cpu", checked_copy(path, tmp_path), Precision.INT8, Samples(odd, 8), tmp_path / "out")
    fresh = odd.samples(3, seed=9)
    expected = onnxruntime.InferenceSession(str(path)).run(None, {"x": fresh})[0]
    (there,) = other_processor.on_haswell("openvino", [(lowered.files[lowered.entry], fresh)], tmp_path)
    assert sqnr_db(expected, there) > HEALTHY


@pytest.mark.parametrize("target", ["generic-cpu", "intel-cpu", pytest.param("rpi4", marks=pytest.mark.campaign)])
def test_a_file_that_is_quantized_already_is_not_quantized_twice(target: str, tmp_path: Path) -> None:
    odd = ODD["answers on the way"]()
    path = tmp_path / "model.onnx"
    onnx.save(odd.model, path)
    first = lower("generic-cpu", checked_copy(path, tmp_path), Precision.INT8, Samples(odd, 32), tmp_path / "first")
    quantized = first.files[first.entry]
    again = lower(target, checked_copy(quantized, tmp_path), Precision.INT8, Samples(odd, 32), tmp_path / "again")
    assert any("quantized already" in note for note in again.notes)
    fresh = odd.samples(3, seed=9)
    expected = onnxruntime.InferenceSession(str(quantized)).run(None, {odd.input: fresh})[0]
    assert sqnr_db(expected, executor(target, again)({odd.input: fresh})["y"]) > (25 if target == "rpi4" else 35)
    if target == "generic-cpu":
        assert sum(path.stat().st_size for path in again.files.values()) < 1.5 * quantized.stat().st_size
