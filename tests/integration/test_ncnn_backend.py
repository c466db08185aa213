"""ONNX to ncnn's files: what they compute by both kernel sets, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import helper
from tests.support import lowering, tflite_graphs

from kedge_protocol.errors import LoweringError, UnsupportedOperatorError, VerificationError
from kedge_targets import registry, target
from kedge_targets.contract import Lowered
from kedge_targets.executor import Executor
from kedge_targets.graph import library
from kedge_targets.numerics import Plan, Precision

Array = npt.NDArray[Any]

BACKEND = "ncnn"

pytestmark = [pytest.mark.usefixtures("ncnn_toolchain"), pytest.mark.packages(BACKEND)]


class Samples:
    """Calibration of any number of inputs."""

    def __init__(self, samples: list[dict[str, Array]]) -> None:
        self._samples = samples
        self.samples = len(samples)

    def __iter__(self) -> Any:
        return iter(self._samples)


def lower(
    model: onnx.ModelProto | Path, folder: Path, precision: Precision, samples: list[dict[str, Array]]
) -> Lowered:
    folder.mkdir()
    path = model if isinstance(model, Path) else folder.parent / f"{folder.name}.onnx"
    if isinstance(model, onnx.ModelProto):
        onnx.save(model, path)
    device = target.find("rpi5")
    return registry.compiler(BACKEND).lower(
        path, Plan(default=precision), Samples(samples), target=device, options={"threads": 1}, workdir=folder
    )


def executor(lowered: Lowered, kernel_set: str) -> Executor:
    return Executor(
        lowered.files[lowered.entry].parent,
        backend=BACKEND,
        entry=lowered.entry,
        options=lowered.runtime_options,
        inputs=lowered.inputs,
        outputs=lowered.outputs,
        kernel_set=kernel_set,
    )


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("precision", "least", "share"), [(Precision.FLOAT32, 90, 1.02), (Precision.FLOAT16, 45, 0.55)]
)
def test_a_network_computes_what_it_did(
    shared_data: Path, tmp_path: Path, precision: Precision, least: float, share: float
) -> None:
    case = lowering.ic(shared_data)
    graph = lowering.checked_copy(case.model, tmp_path)
    lowered = lower(graph, tmp_path / "made", precision, [{"input": one[None]} for one in case.calibration[:3]])
    assert lowering.size(lowered) < share * case.model.stat().st_size
    wanted = lowering.float_answers(case.model, case.evaluation[:20])
    for kernel_set in registry.runtime(BACKEND).kernel_sets:
        session = executor(lowered, kernel_set)
        # Five samples at once: the file takes one.
        got = np.concatenate([session({"input": case.evaluation[at : at + 5]})["output"] for at in range(0, 20, 5)])
        session.close()
        assert tflite_graphs.decibels(wanted, got) > least


def test_every_output_has_its_own_name(tmp_path: Path) -> None:
    stored = tflite_graphs.Stored(3)
    node = helper.make_node
    model = tflite_graphs.model(
        [
            node("Conv", ["x", stored.weight("w", 4, 3, 3, 3)], ["a"], name="conv", **tflite_graphs.SAME),
            node("Relu", ["a"], ["second"], name="relu"),
            node("GlobalAveragePool", ["second"], ["p"], name="pool"),
            node("Flatten", ["p"], ["first"], name="flat"),
        ],
        {"x": ["N", 3, 8, 8]},
        ["first", "second"],
        stored,
    )
    samples = tflite_graphs.samples(model, 3)
    lowered = lower(model, tmp_path / "made", Precision.FLOAT32, samples)
    session = executor(lowered, "fast")
    reference = library.load().InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for sample in samples:
        for name, wanted in zip(["first", "second"], reference.run(["first", "second"], sample), strict=True):
            assert tflite_graphs.decibels(wanted, session(sample)[name]) > 90
    session.close()


def test_what_ncnn_cannot_have_is_refused_by_name(tmp_path: Path) -> None:
    stored = tflite_graphs.Stored(3)
    fourier = tflite_graphs.model(
        [helper.make_node("DFT", ["x"], ["y"], name="fourier", axis=1)], {"x": ["N", 8, 1]}, ["y"], stored
    )
    with pytest.raises(UnsupportedOperatorError, match="DFT"):
        lower(fourier, tmp_path / "fourier", Precision.FLOAT32, [])
    integers = helper.make_model(
        helper.make_graph(
            [helper.make_node("Cast", ["x"], ["y"], to=onnx.TensorProto.FLOAT)],
            "integers",
            [helper.make_tensor_value_info("x", onnx.TensorProto.INT64, ["N", 4])],
            [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", 4])],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    with pytest.raises(LoweringError, match="int64") as caught:
        lower(integers, tmp_path / "integers", Precision.FLOAT32, [])
    assert caught.value.where == "input 'x'"


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.param").write_text("no network")
    with pytest.raises(VerificationError, match="ncnn refuses"):
        registry.runtime(BACKEND).load(tmp_path / "model.param", {})
