"""Samples of unlike length: each is judged at its own, golden vectors hold several, and a target of fixed sizes fills
them up where the model hides what is filled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.support.compiling import unpacked

import kedge
from kedge_agent import Model
from kedge_protocol.bundle.layout import Layout
from kedge_protocol.errors import BudgetError, InputError
from kedge_protocol.golden import load
from kedge_targets.proof import ProveAnswer, ProveRequest, prove

WIDTH, CLASSES = 8, 5


def network(path: Path, *, each_step: bool = False, mask: bool = False) -> Path:
    """Steps [N, T, 8] to one of five classes: of each step, or of their mean, which a mask may be weighed by."""
    rng = np.random.default_rng(0)
    stored = {
        "w1": rng.normal(size=(WIDTH, 32)) * 0.4, "b1": rng.normal(size=32) * 0.5,
        "w2": rng.normal(size=(32, CLASSES)) * 0.9, "b2": np.zeros(CLASSES),
    }  # fmt: skip
    axes = {"time": np.array([1]), "last": np.array([2])}
    make = helper.make_node
    nodes = [make("MatMul", ["x", "w1"], ["m"], "layer1"), make("Add", ["m", "b1"], ["a"]), make("Relu", ["a"], ["h"])]
    if mask:
        nodes += [
            make("Unsqueeze", ["mask", "last"], ["weight"]),
            make("Mul", ["h", "weight"], ["weighed"]),
            make("ReduceSum", ["weighed", "time"], ["sum"], keepdims=0),
            make("ReduceSum", ["mask", "time"], ["count"], keepdims=1),
            make("Div", ["sum", "count"], ["mean"]),
        ]
    elif not each_step:
        nodes += [make("ReduceMean", ["h"], ["mean"], axes=[1], keepdims=0)]
    nodes += [
        make("MatMul", ["h" if each_step else "mean", "w2"], ["l"], "layer2"),
        make("Add", ["l", "b2"], ["scores"]),
        make("Softmax", ["scores"], ["y"], axis=-1),
    ]
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", "T", WIDTH])]
    given += [helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["N", "T"])] if mask else []
    out = ["N", "T", CLASSES] if each_step else ["N", CLASSES]
    held = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in stored.items()]
    held += [numpy_helper.from_array(array.astype(np.int64), name) for name, array in axes.items()]
    graph = helper.make_graph(nodes, "steps", given, [helper.make_tensor_value_info("y", TensorProto.FLOAT, out)], held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    return path


def steps(count: int, seed: int, most: int = 40) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(6, most + 1, count)
    lengths[0] = most
    return [(np.cumsum(rng.normal(size=(length, WIDTH)), axis=0) * 0.4).astype(np.float32) for length in lengths]


def masked(samples: list[np.ndarray]) -> list[dict[str, np.ndarray]]:
    return [{"x": one, "mask": np.ones(len(one), np.float32)} for one in samples]


def compiled(
    model: Path, folder: Path, target: str, calibration: Any, evaluation: Any, **options: Any
) -> kedge.Release:
    return kedge.compile(
        model, name="steps", version="1", targets=[target], out=folder / "OUT", calibration=calibration,
        evaluation=evaluation, **options,
    )  # fmt: skip


def proved(folder: Path, release: kedge.Release, target: str) -> ProveAnswer:
    config = folder.with_suffix(".json")
    config.write_bytes(Layout(release.path).bundle(target).config_raw)
    return prove(ProveRequest(folder=str(folder), config=str(config)), lambda what, done, total: None)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> kedge.Release:
    folder = tmp_path_factory.mktemp("steps")
    model = network(folder / "model.onnx", each_step=True)
    return compiled(model, folder, "generic-cpu", steps(32, 1), steps(80, 2), quantize="precision=int8", max_drop=0.05)


def answers(path: Path, sample: dict[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {name: array[None] for name, array in sample.items()})[0][0])


def test_the_report_counts_each_step_once(release: kedge.Release, tmp_path: Path) -> None:
    """What fills samples up to the longest does not pass for agreement."""
    assert release.report is not None
    float_model, model = network(tmp_path / "m.onnx", each_step=True), Model(release.path, target="generic-cpu")
    same = []
    for one in steps(80, 2):
        wanted, got = answers(float_model, {"x": one}), model(one)
        assert got.shape == wanted.shape
        same.append(np.mean(got.argmax(-1) == wanted.argmax(-1)))
    assert np.mean(same) < 1
    assert release.report.bundles[0].agreement == pytest.approx(np.mean(same), abs=0.15 * (1 - np.mean(same)))


def test_golden_vectors_of_several_lengths_hold_and_tell_damage(release: kedge.Release, tmp_path: Path) -> None:
    config = release.bundles["generic-cpu"].config
    vectors = load(Layout(release.path).blob_path(config.golden.digest))
    lengths = {one["x"].shape[1] for one in vectors.calls(4)}
    assert len(lengths) > 3
    folder = unpacked(release, "generic-cpu", tmp_path / "bundle")
    answer = proved(folder, release, "generic-cpu")
    assert (answer.holds, answer.samples) == (True, vectors.samples)
    model = onnx.load(str(folder / config.entry))
    bytewise = [one for one in model.graph.initializer if one.data_type in (TensorProto.UINT8, TensorProto.INT8)]
    weights = max(bytewise, key=lambda one: len(one.raw_data))
    damaged = numpy_helper.to_array(weights).copy()
    damaged[:, 0] = 0
    weights.CopyFrom(numpy_helper.from_array(damaged, weights.name))
    onnx.save(model, str(folder / config.entry))
    assert not proved(folder, release, "generic-cpu").holds


def test_a_target_of_one_size_fills_up_what_a_mask_hides(tmp_path: Path) -> None:
    path = network(tmp_path / "model.onnx", mask=True)
    release = compiled(path, tmp_path, "rpi4", masked(steps(32, 1)), masked(steps(80, 2)), quantize="precision=int8")
    (x, mask), target = release.bundles["rpi4"].config.inputs, "rpi4"
    assert (x.shape[1:], x.file.shape[1:], mask.file.shape[1:]) == ((None, WIDTH), (40, WIDTH), (40,))
    assert release.report is not None
    assert any("filled up with zeros" in note for note in release.report.bundles[0].notes)
    assert proved(unpacked(release, target, tmp_path / "bundle"), release, target).holds
    model = Model(release.path, target=target)
    for one in masked(steps(20, 3)):
        assert np.abs(model(one) - answers(path, one)).max() < 0.1
    with pytest.raises(InputError, match="axis 1 has length 41, this bundle takes at most 40"):
        model(masked(steps(1, 4, most=41))[0])


def test_a_refusal_says_that_samples_were_filled_up(tmp_path: Path) -> None:
    with pytest.raises(BudgetError) as caught:
        compiled(
            network(tmp_path / "model.onnx"), tmp_path, "rpi4", steps(16, 1), steps(40, 2), quantize="precision=float32"
        )
    assert "give the model a mask" in (caught.value.remedy or "")
