"""A recurrent model from sequences of samples to a session on the device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import kedge
from kedge_agent import Model
from kedge_protocol.errors import ConfigError, InputError

STEPS = 24


def detector(path: Path) -> Path:
    """A step of a GRU as a voice detector has it: frames [N, 8], a state [1, N, 6], a sample rate of one number."""
    rng = np.random.default_rng(3)

    def normal(*shape: int, scale: float = 0.6) -> np.ndarray:
        return (rng.normal(size=shape) * scale).astype(np.float32)

    constants = {
        "axes": np.array([0], np.int64),
        "W": normal(1, 18, 8),
        "R": normal(1, 18, 6),
        "B": normal(1, 36),
        "w": normal(6, 1, scale=3.0),
        "usual": np.array(16000, np.float32),
    }
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["sr"], ["rate"], to=TensorProto.FLOAT),
            helper.make_node("Div", ["rate", "usual"], ["factor"]),
            helper.make_node("Mul", ["input", "factor"], ["scaled"]),
            helper.make_node("Unsqueeze", ["scaled", "axes"], ["frames"]),
            helper.make_node("GRU", ["frames", "W", "R", "B", "", "state"], ["", "stateN"], hidden_size=6),
            helper.make_node("Squeeze", ["stateN", "axes"], ["h"]),
            helper.make_node("MatMul", ["h", "w"], ["logit"]),
            helper.make_node("Sigmoid", ["logit"], ["output"]),
        ],
        "detector",
        [
            helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 8]),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, [1, "N", 6]),
            helper.make_tensor_value_info("sr", TensorProto.INT64, []),
        ],
        [
            helper.make_tensor_value_info("output", TensorProto.FLOAT, ["N", 1]),
            helper.make_tensor_value_info("stateN", TensorProto.FLOAT, [1, "N", 6]),
        ],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def recordings(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, STEPS, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> kedge.Release:
    folder = tmp_path_factory.mktemp("states")
    np.savez(folder / "c.npz", input=recordings(4, 1), sr=np.int64(16000))
    np.savez(folder / "e.npz", input=recordings(3, 2), sr=np.int64(16000))
    return kedge.compile(
        detector(folder / "detector.onnx"),
        name="vad",
        version="1",
        targets=["generic-cpu"],
        calibration=folder / "c.npz",
        evaluation=folder / "e.npz",
        out=folder / "OUT",
        quantize="precision=int8",
        max_drop=0.1,
    )


def in_float(model: Path, frames: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    state, found = np.zeros((1, 1, 6), np.float32), []
    for frame in frames:
        output, state = session.run(None, {"input": frame[None], "state": state, "sr": np.array(16000)})
        found.append(output[0, 0])
    return np.array(found)


def test_a_session_carries_the_state_and_decides_as_float_does(release: kedge.Release) -> None:
    frames = recordings(1, 9)[0]
    wanted = in_float(release.path.parent / "detector.onnx", frames)
    model = Model(release.path, target="generic-cpu")
    session = model.session()
    got = np.array([session(frame, sr=16000) for frame in frames])[:, 0]
    assert wanted.min() < 0.2
    assert wanted.max() > 0.8
    assert np.mean((got > 0.5) == (wanted > 0.5)) >= 0.9
    session.reset()
    assert session(frames[0][None], sr=16000)[0, 0] == got[0]


def test_without_a_session_the_model_has_its_own_axes(release: kedge.Release) -> None:
    model = Model(release.path, target="generic-cpu")
    two = {"input": recordings(2, 5)[:, 0], "state": np.zeros((1, 2, 6), np.float32), "sr": 16000}
    answer = model(two)
    assert answer["output"].shape == (2, 1)
    assert answer["stateN"].shape == (1, 2, 6)
    assert [(state.input, state.output) for state in model.config.states] == [("state", "stateN")]
    with pytest.raises(InputError, match=r"shape 2x1x6 does not fit 1x\?x6 .second axis is the batch"):
        model({**two, "state": np.zeros((2, 1, 6), np.float32)})


def test_the_evaluation_counts_every_step_with_the_states_of_the_candidate(release: kedge.Release) -> None:
    assert release.report is not None
    assert release.bundles["generic-cpu"].config.metric.samples == 3 * STEPS
    assert (release.report.bundles[0].agreement or 0) >= 0.9


def test_axes_and_states_that_are_none_are_refused_at_once(tmp_path: Path) -> None:
    path = detector(tmp_path / "d.onnx")
    common = {"name": "m", "version": "1", "targets": ["generic-cpu"], "out": tmp_path / "OUT"}
    np.savez(tmp_path / "d.npz", input=recordings(1, 1), sr=np.int64(1))
    for said, options in (
        ("'nothing' is no input of the model", {"states": {"nothing": "output"}}),
        ("'nothing' is no input or output", {"batch_axes": {"nothing": None}}),
    ):
        with pytest.raises(ConfigError, match=said):
            kedge.compile(path, calibration=tmp_path / "d.npz", evaluation=tmp_path / "d.npz", **common, **options)
