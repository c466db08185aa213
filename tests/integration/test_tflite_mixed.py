"""Int8 of graphs of odd kinds: every output stays what it is, by both kernel sets, and what stays in float is named."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import helper
from tests.support import field, lowering, tflite_graphs
from tests.support.requirements import missing

from kedge_protocol.errors import LoweringError
from kedge_targets.backends.tflite import counting
from kedge_targets.contract import Lowered
from kedge_targets.graph import library
from kedge_targets.numerics import Plan, Precision

Array = npt.NDArray[Any]

pytestmark = pytest.mark.usefixtures("tflite_toolchain")

HEALTHY = 25.0  # dB


class Samples:
    """Calibration of any number of inputs."""

    def __init__(self, samples: list[dict[str, Array]]) -> None:
        self._samples = samples
        self.samples = len(samples)

    def __iter__(self) -> Any:
        return iter(self._samples)


def lower(model: onnx.ModelProto, folder: Path, **layers: Precision) -> Lowered:
    folder.mkdir()
    path = folder.parent / f"{folder.name}.onnx"
    onnx.save(model, path)
    plan = Plan(default=Precision.INT8, layers=layers)
    return lowering.lower("rpi4", path, plan, Samples(tflite_graphs.samples(model, 32)), folder)


def judged(model: onnx.ModelProto, lowered: Lowered) -> dict[str, float]:
    """Each output's dB on fresh samples, by the worse of the kernel sets."""
    names = [value.name for value in model.graph.output]
    session = library.load().InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = dict.fromkeys(names, 200.0)
    fresh = tflite_graphs.samples(model, 8, seed=100)
    wanted = [np.concatenate(parts) for parts in zip(*(session.run(names, one) for one in fresh), strict=True)]
    for kernels in ("xnnpack", "builtin"):
        executor = lowering.executor("rpi4", lowered, kernels)
        answers = [executor(one) for one in fresh]
        executor.close()
        for name, reference in zip(names, wanted, strict=True):
            got = np.concatenate([answer[name] for answer in answers])
            found[name] = min(found[name], tflite_graphs.decibels(reference, got))
    return found


@pytest.fixture(scope="module")
def odd() -> onnx.ModelProto:
    return tflite_graphs.odd()


@pytest.fixture(scope="module")
def odd_int8(odd: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    return lower(odd, tmp_path_factory.mktemp("odd") / "int8")


@pytest.fixture(scope="module")
def odd_decibels(odd: onnx.ModelProto, odd_int8: Lowered) -> dict[str, float]:
    return judged(odd, odd_int8)


@pytest.mark.parametrize(
    "output", ["first conv", "pooled", "edges", "behind clip", "beside clip", "detections", "large part"]
)
def test_every_output_stays_what_it_is(odd_decibels: dict[str, float], output: str) -> None:
    assert odd_decibels[output] > HEALTHY


def test_scores_are_not_lost_beside_boxes(odd: onnx.ModelProto, odd_int8: Lowered) -> None:
    session = library.load().InferenceSession(odd.SerializeToString(), providers=["CPUExecutionProvider"])
    executor = lowering.executor("rpi4", odd_int8)
    wanted, got = [], []
    for sample in tflite_graphs.samples(odd, 8, seed=100):
        wanted.append(session.run(["detections"], sample)[0][:, 4:])
        got.append(executor(sample)["detections"][:, 4:])
    executor.close()
    assert tflite_graphs.decibels(np.concatenate(wanted), np.concatenate(got)) > 20


def test_what_stays_in_float_is_named_as_the_model_names_it(odd_int8: Lowered) -> None:
    assert {"scores", "boxes", "detections", "clip"} <= set(odd_int8.floating)
    assert any("kept in float" in note and "clip" in note for note in odd_int8.notes)
    assert not {"layer 1", "layer 2", "layer 3"} & set(odd_int8.floating)


def test_outputs_without_integers_leave_in_float(odd_int8: Lowered) -> None:
    dtypes = {spec.name: spec.file.dtype for spec in odd_int8.outputs if spec.file is not None}
    assert dtypes["detections"] == "float32"
    assert dtypes["beside clip"] == "int8"


def test_a_layer_of_the_plan_stays_in_float(odd: onnx.ModelProto, odd_int8: Lowered, tmp_path: Path) -> None:
    mixed = lower(odd, tmp_path / "mixed", **{"layer 2": Precision.FLOAT32})
    before, after = (counting.numbers(one.files[one.entry]) for one in (odd_int8, mixed))
    # 8 x 4 x 3 x 3 weights at 64 places.
    assert before.integer_macs - after.integer_macs == 8 * 4 * 9 * 64
    assert after.integer_macs > 0
    assert judged(odd, mixed)["behind clip"] > judged(odd, odd_int8)["behind clip"]


def test_a_branch_that_is_always_0_leaves_the_others_in_integers(tmp_path: Path) -> None:
    # Most of the tensors are 0 on all samples, as behind a channel that died.
    node, stored = onnx.helper.make_node, tflite_graphs.Stored(5)
    nodes = [
        node("Conv", ["x", stored.weight("w", 8, 3, 3, 3)], ["alive"], name="alive", **tflite_graphs.SAME),
        node("Conv", ["alive", stored.weight("w0", 8, 8, 3, 3), stored.value("b0", np.full(8, -1e3, np.float32))],
             ["low"], name="low", **tflite_graphs.SAME),
        node("Relu", ["low"], ["dead 0"]),
    ]  # fmt: skip
    for at in range(7):
        weight = stored.weight(f"w{at + 1}", 8, 8, 3, 3)
        nodes.append(node("Conv", [f"dead {at}", weight], [f"made {at}"], name=f"dead {at}", **tflite_graphs.SAME))
        nodes.append(node("Relu", [f"made {at}"], [f"dead {at + 1}"]))
    nodes.append(node("Add", ["alive", "dead 7"], ["both"]))
    nodes.append(node("Conv", ["both", stored.weight("w9", 4, 8, 3, 3)], ["answer"], name="end", **tflite_graphs.SAME))
    model = tflite_graphs.model(nodes, {"x": ["N", 3, 8, 8]}, ["answer"], stored)
    lowered = lower(model, tmp_path / "int8")
    assert judged(model, lowered)["answer"] > HEALTHY
    numbers = counting.numbers(lowered.files[lowered.entry])
    assert numbers.integer_macs == numbers.macs


def test_equal_plans_give_equal_files(odd: onnx.ModelProto, odd_int8: Lowered, tmp_path: Path) -> None:
    again = lower(odd, tmp_path / "again")
    assert lowering.content(again) == lowering.content(odd_int8)


def test_a_node_that_only_lays_numbers_out_anew_may_stay_in_float(tmp_path: Path) -> None:
    # Its answer holds what it reads, so it cannot be told from its neighbours.
    model = tflite_graphs.old()
    ends = dict.fromkeys(("mean", "squeeze", "head"), Precision.FLOAT32)
    lowered = lower(model, tmp_path / "int8", **ends)
    before = counting.numbers(lower(model, tmp_path / "whole").files["model.tflite"])
    after = counting.numbers(lowered.files[lowered.entry])
    assert before.integer_macs - after.integer_macs == 8 * 3
    assert judged(model, lowered)["y"] > HEALTHY


def test_a_layer_that_is_not_there_is_refused(odd: onnx.ModelProto, tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match="layer 9"):
        lower(odd, tmp_path / "x", **{"layer 9": Precision.FLOAT32})


APART = ("conv 3", "conv 4")
"""What gives numbers far from zero, and what reads them."""


@pytest.fixture(scope="module")
def apart() -> onnx.ModelProto:
    return tflite_graphs.far_from_zero()


@pytest.fixture(scope="module", params=[Precision.FLOAT32, Precision.INT16])
def spared(
    apart: onnx.ModelProto, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Precision, Lowered]:
    folder = tmp_path_factory.mktemp("apart") / "mixed"
    return request.param, lower(apart, folder, **dict.fromkeys(APART, request.param))


def test_layers_that_int8_cannot_carry_are_spared_in_float_or_with_16_bits(
    apart: onnx.ModelProto, spared: tuple[Precision, Lowered], tmp_path: Path
) -> None:
    precision, mixed = spared
    plain = lower(apart, tmp_path / "int8")
    assert judged(apart, mixed)["y"] > judged(apart, plain)["y"] + 10
    numbers = counting.numbers(mixed.files[mixed.entry])
    if precision is Precision.INT16:
        assert numbers.weights_in_integers == numbers.macs_in_integers == 1.0
        assert lowering.size(mixed) < 1.05 * lowering.size(plain)
    else:
        assert set(numbers.weight_bytes) == {"int8", "float32"}
        assert lowering.size(mixed) < 0.4 * len(apart.SerializeToString())


def test_the_runtime_of_old_boards_answers_alike(
    apart: onnx.ModelProto, spared: tuple[Precision, Lowered], tmp_path: Path
) -> None:
    _, mixed = spared
    python = field.LEGACY / "bin" / "python"
    if not python.exists():
        missing("the environment .venv-legacy", "make setup")
    samples = [next(iter(one.values())) for one in tflite_graphs.samples(apart, 8, seed=100)]
    np.save(tmp_path / "given.npy", np.concatenate(samples))
    script = Path(__file__).parent.parent / "support" / "old_runtime.py"
    arguments = [python, script, mixed.files[mixed.entry], tmp_path / "given.npy", tmp_path / "made.npy"]
    subprocess.run([str(one) for one in arguments], check=True, timeout=300, env={"PATH": os.environ["PATH"]})
    executor = lowering.executor("rpi4", mixed, "builtin")
    wanted = np.concatenate([executor({"x": sample})["y"] for sample in samples])
    executor.close()
    # Single numbers are rounded to the other step.
    assert tflite_graphs.decibels(wanted, np.load(tmp_path / "made.npy")) > 35


def test_a_layer_whose_operator_has_no_kernels_of_16_bits_is_refused(odd: onnx.ModelProto, tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match="16 bits") as caught:
        lower(odd, tmp_path / "x", relative=Precision.INT16)
    assert "relative" in str(caught.value.where)


@pytest.mark.campaign
def test_recurrent_layers_run_step_by_step(tmp_path: Path) -> None:
    model = tflite_graphs.recurrent()
    lowered = lower(model, tmp_path / "int8")
    assert judged(model, lowered)["scores"] > 20


def test_an_outlier_keeps_the_layer_that_reads_it_in_float(tmp_path: Path) -> None:
    model = tflite_graphs.outlier()
    lowered = lower(model, tmp_path / "int8")
    assert "first" in lowered.floating
    assert judged(model, lowered)["p"] > HEALTHY


def test_ranges_begin_where_activations_answer(tmp_path: Path) -> None:
    model = tflite_graphs.far_below_zero()
    lowered = lower(model, tmp_path / "int8")
    assert not lowered.floating
    assert judged(model, lowered)["y"] > HEALTHY


def test_an_old_opset_is_taken(tmp_path: Path) -> None:
    model = tflite_graphs.old()
    assert judged(model, lower(model, tmp_path / "int8"))["y"] > HEALTHY


def test_a_quantized_file_is_quantized_once(tmp_path: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    given = tflite_graphs.old()
    onnx.save(onnx.version_converter.convert_version(given, 17), tmp_path / "float.onnx")

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        rows = iter(tflite_graphs.samples(given, 16))

        def get_next(self) -> Any:
            return next(self.rows, None)

    quantize_static(str(tmp_path / "float.onnx"), str(tmp_path / "qdq.onnx"), Reader())
    model = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "qdq.onnx"))
    lowered = lower(model, tmp_path / "int8")
    assert judged(model, lowered)["y"] > HEALTHY
    assert any("quantized already" in note for note in lowered.notes)
    assert counting.numbers(lowered.files[lowered.entry]).integer_macs > 0


def test_a_division_by_norms_that_are_almost_0_stays_in_float(tmp_path: Path) -> None:
    """Features after a Relu, divided by their length: as integers some lengths are 0, at which the kernel gives up."""
    stored = tflite_graphs.Stored(1)
    rng = np.random.default_rng(0)
    weight = stored.value("w", rng.standard_normal((8, 3, 3, 3)).astype(np.float32))
    axes, least = stored.value("axes", np.array([1])), stored.value("least", np.float32(1e-10))
    nodes = [
        helper.make_node("Conv", ["x", weight], ["c"], name="conv", kernel_shape=[3, 3], pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("Mul", ["r", "r"], ["squares"], name="squares"),
        helper.make_node("ReduceSum", ["squares", axes], ["sum"], name="sum"),
        helper.make_node("Sqrt", ["sum"], ["root"], name="root"),
        helper.make_node("Add", ["root", least], ["length"], name="length"),
        helper.make_node("Div", ["r", "length"], ["y"], name="division"),
    ]
    model = tflite_graphs.model(nodes, {"x": ["N", 3, 16, 16]}, ["y"], stored)
    lowered = lower(model, tmp_path / "int8")
    assert judged(model, lowered)["y"] > HEALTHY
