"""A detector with its own suppression: as many boxes as it finds, from the compilation to the call."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.support.compiling import unpacked

import kedge
from kedge_agent import Model
from kedge_protocol.errors import InputError
from kedge_targets.proof import ProveRequest, prove


def detector(path: Path) -> Path:
    """Pictures [N, 3, 64, 64], of which the graph takes one at a time; boxes [K, 4] above a score."""
    rng = np.random.default_rng(0)
    stored = {
        "w": (rng.normal(size=(5, 3, 8, 8)) * 0.6).astype(np.float32),
        "b": np.array([0, 0, 0, 0, 2], np.float32),
        "shape": np.array([0, 5, 64]),
        "parts": np.array([4, 1]),
        "most": np.array([20]),
        "overlap": np.array([0.5], np.float32),
        "least": np.array([0.2], np.float32),
        "two": np.array([2]),
        "one": np.array([1]),
        "zero": np.array([0]),
    }
    make = helper.make_node
    nodes = [
        make("Conv", ["x", "w", "b"], ["c"], "conv", strides=[8, 8]),
        make("Reshape", ["c", "shape"], ["r"], "flat"),
        make("Split", ["r", "parts"], ["box", "score"], "split", axis=1),
        make("Sigmoid", ["box"], ["sides"], "sides"),
        make("Transpose", ["sides"], ["boxes"], "turn", perm=[0, 2, 1]),
        make("Sigmoid", ["score"], ["scores"], "scores"),
        make("NonMaxSuppression", ["boxes", "scores", "most", "overlap", "least"], ["kept"], "nms"),
        make("Gather", ["kept", "two"], ["columns"], "column", axis=1),
        make("Squeeze", ["columns", "one"], ["indices"], "indices"),
        make("Gather", ["boxes", "indices"], ["found"], "gather", axis=1),
        make("Squeeze", ["found", "zero"], ["detections"], "out"),
    ]
    graph = helper.make_graph(
        nodes,
        "detector",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 64, 64])],
        [helper.make_tensor_value_info("detections", TensorProto.FLOAT, [None, 4])],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def test_as_many_boxes_as_there_are(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    pictures = np.kron(rng.uniform(0, 1, (24, 3, 16, 16)), np.ones((1, 1, 4, 4))).astype(np.float32)
    np.savez(tmp_path / "c.npz", x=pictures[:8])
    np.savez(tmp_path / "e.npz", x=pictures[8:20])
    release = kedge.compile(
        detector(tmp_path / "model.onnx"),
        name="detector",
        version="1",
        targets=["generic-cpu"],
        calibration=tmp_path / "c.npz",
        evaluation=tmp_path / "e.npz",
        out=tmp_path / "OUT",
        quantize="precision=float32",
    )
    model = Model(release.path, target="generic-cpu")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    lengths = set()
    for picture in pictures[20:]:
        wanted = session.run(None, {"x": picture[None]})[0]
        assert np.allclose(model(picture), wanted, atol=1e-5)
        lengths.add(len(wanted))
    assert len(lengths) > 1
    with pytest.raises(InputError, match="'detections' belongs to one sample, 2 were given"):
        model(pictures[:2])
    folder = unpacked(release, "generic-cpu", tmp_path / "slot")
    proved = prove(ProveRequest(folder=str(folder), config=str(folder / "config.json")), lambda *_: None)
    assert proved.holds, proved.reason
