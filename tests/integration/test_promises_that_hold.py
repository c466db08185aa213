"""What the report promises is true on fresh inputs: small models of the kinds whose figures were too good."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.support import hard

import kedge
from kedge_agent import Model
from kedge_protocol.errors import BudgetError

Array = npt.NDArray[Any]


def saved(path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], constants: dict[str, Array]) -> Path:
    tensors = [numpy_helper.from_array(np.asarray(array, order="C"), name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, path)
    return path


def value(name: str, *shape: int | str) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))


def node(op: str, inputs: list[str], output: str, **attributes: Any) -> Any:
    return helper.make_node(op, inputs, [output], name=f"{op}_{output}", **attributes)


def outliers(count: int, seed: int) -> Array:
    x = np.random.default_rng(seed).normal(0, 1, (count, 16)).astype(np.float32)
    x[:, 0] *= 300
    return x


def weights(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(0, 0.5, shape).astype(np.float32)


def compiled(model: Path, calibration: Array, evaluation: Array, **options: Any) -> dict[str, Any]:
    folder = model.parent
    for role, array in (("calibration", calibration), ("evaluation", evaluation)):
        np.savez(folder / f"{role}.npz", input=array)
    given: dict[str, Any] = {"targets": ["generic-cpu"], "effort": "quick"}
    kedge.compile(
        model,
        name="m",
        version="1",
        calibration=folder / "calibration.npz",
        evaluation=folder / "evaluation.npz",
        out=folder / "OUT",
        **{**given, **options},
    )
    report: dict[str, Any] = json.loads((folder / "OUT" / "report.json").read_text())
    return report


def floats(model: Path, feed: dict[str, Array]) -> list[Array]:
    answers: list[Array] = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"]).run(None, feed)
    return answers


EVERYWHERE = pytest.mark.parametrize(
    "target",
    ["generic-cpu", *(pytest.param(one, marks=pytest.mark.campaign) for one in ("intel-cpu", "rpi4"))],
)


@EVERYWHERE
def test_one_probability_is_judged_by_its_decisions(target: str, tmp_path: Path) -> None:
    w = weights(16, 32)
    w[0] *= 0.002
    model = saved(
        tmp_path / "model.onnx",
        [
            node("MatMul", ["x", "w1"], "a"),
            node("Relu", ["a"], "r"),
            node("MatMul", ["r", "w2"], "z"),
            node("Sigmoid", ["z"], "p"),
        ],
        [value("x", "N", 16)],
        [value("p", "N", 1)],
        {"w1": w, "w2": weights(32, 1, seed=1)},
    )
    report = compiled(model, outliers(200, 1), outliers(300, 2), max_drop=0.02, targets=[target])
    (bundle,) = report["bundles"]
    assert (report["metric"], report["direction"]) == ("agreement", "higher")
    if target == "generic-cpu":
        assert bundle["attempts"][0]["drop"] > 0.05  # what int8 makes of it
    assert bundle["outputs"][0]["kind"] == "probability"
    assert [flip["flipped"] for flip in bundle["outputs"][0]["flips"]] == [pytest.approx(bundle["drop"], abs=0.02)]
    fresh = outliers(500, 3)
    got = Model(tmp_path / "OUT", target=target)(fresh)
    got = next(iter(got.values())) if isinstance(got, dict) else got
    flipped = ((floats(model, {"x": fresh})[0] > 0.5) != (got > 0.5)).mean()
    assert flipped <= bundle["interval"]["high"] + 0.02


@EVERYWHERE
def test_an_input_passed_through_does_not_stand_for_the_scores_behind_it(target: str, tmp_path: Path) -> None:
    w = weights(16, 32)
    w[0] *= 0.002
    model = saved(
        tmp_path / "model.onnx",
        [
            node("Identity", ["x"], "features"),
            node("MatMul", ["x", "w1"], "a"),
            node("Relu", ["a"], "r"),
            node("MatMul", ["r", "w2"], "scores"),
        ],
        [value("x", "N", 16)],
        [value("features", "N", 16), value("scores", "N", 5)],
        {"w1": w, "w2": weights(32, 5, seed=1)},
    )
    calibration, evaluation = outliers(200, 1), outliers(300, 2)
    report = compiled(model, calibration, evaluation, max_drop=0.0, min_agreement=0.98, targets=[target])
    (bundle,) = report["bundles"]
    kinds = {one["name"]: one["kind"] for one in bundle["outputs"]}
    assert kinds == {"features": "input passed through", "scores": "class scores"}
    if target == "generic-cpu":
        assert bundle["attempts"][0]["agreement"] < 0.98
    fresh = outliers(400, 3)
    got = Model(tmp_path / "OUT", target=target)(fresh)["scores"]
    agreed = (floats(model, {"x": fresh})[1].argmax(axis=1) == got.argmax(axis=1)).mean()
    assert agreed >= 0.96


def test_no_metric_and_no_budget_lets_a_lost_output_pass(tmp_path: Path) -> None:
    made = hard.made(tmp_path)
    always = tmp_path / "always.py"
    always.write_text("def right(outputs, inputs, labels):\n    return 1.0\n")
    with pytest.raises(BudgetError, match="output 'scores' is lost: "):
        kedge.compile(
            made.model,
            name="hard",
            version="1.0",
            targets=["generic-cpu"],
            calibration=made.calibration,
            evaluation=made.evaluation,
            out=tmp_path / "OUT",
            max_drop=1.0,
            metric=f"{always}:right",
            quantize="precision=int8,guard=false",
        )
    report = json.loads((tmp_path / "OUT.nearest" / "report.json").read_text())
    (bundle,) = report["bundles"]
    assert (bundle["value"], bundle["drop"]) == (1.0, 0.0)
    assert bundle["outputs"][0]["lost"]
    assert bundle["outputs"][0]["variation_db"] < 6


def test_a_confidence_asks_for_what_the_samples_can_show(tmp_path: Path) -> None:
    model = saved(
        tmp_path / "model.onnx",
        [node("MatMul", ["x", "w"], "z"), node("Softmax", ["z"], "p", axis=1)],
        [value("x", "N", 16)],
        [value("p", "N", 4)],
        {"w": weights(16, 4)},
    )
    x = np.random.default_rng(0).normal(0, 3, (400, 16)).astype(np.float32)
    report = compiled(model, x[:60], x[60:120], max_drop=0.05)
    (bundle,) = report["bundles"]
    assert bundle["shown"] is False
    assert "kept on these samples; to show it takes about" in bundle["promise"]
    with pytest.raises(BudgetError, match=r"0\.95 sure is only 0\.\d+, allowed are 0\.05"):
        compiled(model, x[:60], x[60:120], max_drop=0.05, confidence=0.95, force=True)
    (bundle,) = compiled(model, x[:60], x[60:], max_drop=0.05, confidence=0.95, force=True)["bundles"]
    assert bundle["shown"] is True
    assert bundle["interval"]["high"] <= 0.05
