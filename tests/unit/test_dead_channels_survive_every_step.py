"""Published networks hold channels that training switched off: rows of about 1e-30, or scales of batch normalization
near 0. No step may make numbers of them that the others drown in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from kedge import steps
from kedge.step import Context
from kedge_protocol.errors import StepError
from kedge_targets.graph import model_reader
from kedge_targets.numerics import Plan, Precision

Array = np.ndarray[Any, Any]

OPTIONS: dict[str, dict[str, Any]] = {
    "distil": {"steps": 5},
    "fine-tune": {"steps": 5},
    "prune-channels": {"ratio": 0.25, "multiple_of": 4},
    "sparsify": {"ratio": 0.25},
}
"""Where a step's own options would take long, or do nothing on so small a network."""
NOTHING_TO_DO = {"drop-layers", "prune-heads", "prune-width"}
"""Steps for transformers and language models."""
LOSSLESS_DB = 35.0
LOSSY_DB = 3.0
LOSSY = {"prune-channels", "sparsify", "distil", "fine-tune"}


def picture(count: int, seed: int) -> Array:
    return np.random.default_rng(seed).normal(size=(count, 3, 16, 16)).astype(np.float32)


class Samples:
    """Calibration samples."""

    samples = 32

    def batches(self, size: int) -> Iterator[dict[str, Array]]:
        data = picture(self.samples, 1)
        for start in range(0, self.samples, size):
            yield {"x": data[start : start + size]}

    def __iter__(self) -> Iterator[dict[str, Array]]:
        return self.batches(1)


def network(form: str) -> onnx.ModelProto:
    """Convolution, depthwise convolution, convolution, pooling, product; every second channel of the first is dead."""
    rng = np.random.default_rng(0)
    first = rng.normal(size=(16, 3, 3, 3)).astype(np.float32) * 0.3
    bias = rng.normal(size=16).astype(np.float32) * 0.1
    gamma = np.ones(16, dtype=np.float32)
    (first if form == "rows" else gamma)[::2] *= 1e-30
    bias[::2] = 0.05
    constants = {
        "w1": first,
        "b1": bias,
        "w2": rng.normal(size=(16, 1, 3, 3)).astype(np.float32) * 0.4,
        "w3": rng.normal(size=(12, 16, 1, 1)).astype(np.float32) * 0.3,
        "b3": rng.normal(size=12).astype(np.float32) * 0.1,
        "w4": rng.normal(size=(12, 6)).astype(np.float32),
    }
    node = helper.make_node
    if form == "rows":
        nodes = [node("Conv", ["x", "w1", "b1"], ["n1"], name="first", pads=[1] * 4)]
    else:
        constants |= {"gamma": gamma, "mean": np.zeros(16, np.float32), "variance": np.ones(16, np.float32)}
        nodes = [
            node("Conv", ["x", "w1"], ["c1"], name="first", pads=[1] * 4),
            node("BatchNormalization", ["c1", "gamma", "b1", "mean", "variance"], ["n1"], name="norm"),
        ]
    nodes += [
        node("Relu", ["n1"], ["r1"], name="relu1"),
        node("Conv", ["r1", "w2"], ["c2"], name="depthwise", group=16, pads=[1] * 4),
        node("Relu", ["c2"], ["r2"], name="relu2"),
        node("Conv", ["r2", "w3", "b3"], ["c3"], name="third"),
        node("Relu", ["c3"], ["r3"], name="relu3"),
        node("GlobalAveragePool", ["r3"], ["p"], name="pool"),
        node("Flatten", ["p"], ["f"], name="flat"),
        node("MatMul", ["f", "w4"], ["y"], name="last"),
    ]
    graph = helper.make_graph(
        nodes,
        "dead",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 6])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def answers(model: onnx.ModelProto, fresh: Array) -> Array:
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    made: Array = session.run(None, {"x": fresh})[0]
    return made


@pytest.mark.parametrize("form", ["rows", "norm"])
@pytest.mark.parametrize("name", sorted(set(steps.names()) - NOTHING_TO_DO))
def test_a_network_with_dead_channels_survives(name: str, form: str, tmp_path: Path) -> None:
    path = tmp_path / "float.onnx"
    onnx.save(network(form), path)
    model = model_reader.load(path)
    step = steps.find(name)
    context = Context(teacher=model, samples=Samples(), plan=Plan(default=Precision.INT8), workdir=tmp_path / "work")
    context.workdir.mkdir()
    try:
        made = step(step.Options(**OPTIONS.get(name, {}))).apply(model, context)
    except StepError as error:
        pytest.fail(f"refused: {error}")
    fresh = picture(32, 2)
    wanted, got = answers(model, fresh), answers(made, fresh)
    decibels = 10 * np.log10((wanted**2).sum() / max(((got - wanted) ** 2).sum(), 1e-30))
    assert decibels > (LOSSY_DB if name in LOSSY else LOSSLESS_DB)
    largest = max(
        float(np.abs(numpy_helper.to_array(one)).max()) for one in made.graph.initializer if one.data_type == 1
    )
    assert largest < 100
