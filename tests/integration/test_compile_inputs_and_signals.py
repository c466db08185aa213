"""Several inputs, fixed batches, data that do not fit in memory, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.support.bundles import CLASSES, mlp, samples
from tests.support.compiling import Inputs, small_inputs
from tests.support.waiting import wait_for

import kedge
from kedge_agent.model import Model
from kedge_protocol import digest
from kedge_protocol.bundle.config import Preprocess
from kedge_protocol.bundle.layout import Layout


def two_inputs(folder: Path) -> Inputs:
    model = folder / "double.onnx"
    model.write_bytes(mlp(double=True))
    offset = np.random.default_rng(4).normal(size=(160, CLASSES)).astype(np.float32)
    raw = samples(160)
    np.savez(folder / "calibration.npz", input=raw[:64], offset=offset[:64])
    np.savez(folder / "evaluation.npz", input=raw[64:], offset=offset[64:])
    return Inputs(model, folder / "calibration.npz", folder / "evaluation.npz", folder / "OUT")


@pytest.mark.parametrize("target", ["generic-cpu", "intel-cpu"])
def test_two_inputs_and_two_outputs(tmp_path: Path, target: str) -> None:
    inputs = two_inputs(tmp_path)
    release = kedge.compile(
        inputs.model,
        name="double",
        version="1",
        targets=[target],
        calibration=inputs.calibration,
        evaluation=inputs.evaluation,
        out=inputs.out,
        max_drop=0.1,
        preprocess=["offset:scale=2,mean=1"],
    )
    config = release.bundles[target].config
    assert [spec.name for spec in config.inputs] == ["input", "offset"]
    assert [spec.name for spec in config.outputs] == ["scores", "hidden"]
    assert config.inputs[0].preprocess is None
    assert config.inputs[1].preprocess == Preprocess(scale=(2.0,), mean=(1.0,))
    data = np.load(inputs.evaluation)
    answers = Model(release.path, target=target)({"input": data["input"][:5], "offset": data["offset"][:5]})
    assert isinstance(answers, dict)
    assert {name: array.shape for name, array in answers.items()} == {"scores": (5, 4), "hidden": (5, 32)}


def test_input_is_no_name_where_there_are_two(tmp_path: Path) -> None:
    inputs = two_inputs(tmp_path)
    np.savez(inputs.calibration, input=samples(20))
    with pytest.raises(kedge.errors.DatasetError, match="no array for input 'offset'"):
        kedge.compile(
            inputs.model,
            name="double",
            version="1",
            targets=["generic-cpu"],
            calibration=inputs.calibration,
            evaluation=inputs.evaluation,
            out=inputs.out,
        )


def test_a_model_of_one_sample_at_a_time(tmp_path: Path) -> None:
    inputs = small_inputs(tmp_path)
    inputs.model.write_bytes(mlp(batch=1))
    release = kedge.compile(
        inputs.model,
        name="one",
        version="1",
        targets=["generic-cpu"],
        calibration=inputs.calibration,
        evaluation=inputs.evaluation,
        out=inputs.out,
        max_drop=0.05,
    )
    assert release.report is not None
    assert release.report.bundles[0].evaluation_samples == 96
    assert release.report.bundles[0].drop <= 0.05


def test_weights_in_a_file_beside_the_model(tmp_path: Path) -> None:
    import onnx

    inputs = small_inputs(tmp_path)
    whole = onnx.load(inputs.model)
    onnx.save_model(whole, inputs.model, save_as_external_data=True, location="weights.bin", size_threshold=0)
    beside = tmp_path / "weights.bin"
    before = digest.of_file(inputs.model), digest.of_file(beside)
    release = kedge.compile(
        inputs.model,
        name="apart",
        version="1",
        targets=["generic-cpu"],
        calibration=inputs.calibration,
        evaluation=inputs.evaluation,
        out=inputs.out,
        max_drop=0.05,
    )
    assert (digest.of_file(inputs.model), digest.of_file(beside)) == before
    assert release.report is not None
    assert release.report.reference.size_bytes == inputs.model.stat().st_size + beside.stat().st_size
    assert release.bundles["generic-cpu"].config.provenance.model_digest not in before
    beside.unlink()
    with pytest.raises(kedge.errors.ModelError, match="its external data cannot be read"):
        kedge.compile(
            inputs.model,
            name="apart",
            version="1",
            targets=["generic-cpu"],
            calibration=inputs.calibration,
            evaluation=inputs.evaluation,
            out=tmp_path / "OUT2",
        )


MEASURED = """
import resource, sys
import kedge
release = kedge.compile({model!r}, name="m", version="1", targets=["generic-cpu"], calibration={calibration!r},
                        evaluation={evaluation!r}, out={out!r}, max_drop=1.0, memory_limit=300)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_data_are_streamed_and_not_held(tmp_path: Path) -> None:
    """400 MB of samples in a folder, with 300 MiB allowed to each step."""
    from onnx import TensorProto, helper, numpy_helper, save_model

    width = 100_000
    weight = np.random.default_rng(0).normal(size=(width, 4)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="head")],
        "wide",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
        [numpy_helper.from_array(weight, "w")],
    )
    save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    rng = np.random.default_rng(1)
    for name, count in (("calibration", 20), ("evaluation", 1000)):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "x.npy"
        array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(count, width))
        for index in range(count):
            array[index] = rng.random(width, dtype=np.float32) - 0.5
        del array
    places = {name: str(tmp_path / name) for name in ("calibration", "evaluation")}
    code = MEASURED.format(model=str(tmp_path / "m.onnx"), out=str(tmp_path / "OUT"), **places)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    Layout(tmp_path / "OUT").verify()


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    inputs = small_inputs(tmp_path)
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import time, pathlib\n"
        "def f(outputs, inputs, labels):\n"
        "    (pathlib.Path(__file__).parent / 'begun').touch()\n"
        "    time.sleep(300)\n"
    )
    command = [sys.executable, "-m", "kedge.cli.main", *inputs.arguments(metric=f"{slow}:f")]
    before = {path.name for path in tmp_path.iterdir()} | {"begun", "__pycache__"}
    # A shell's background job ignores SIGINT and hands that down; a handler of our own is not handed down.
    kept = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    signal.signal(signal.SIGINT, kept)
    wait_for((tmp_path / "begun").exists, what="the metric's first call")
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "interrupted" in said
    assert {path.name for path in tmp_path.iterdir()} <= before
