"""A model whose int8 form is far slower than float on this very machine: said, and taken only by who wants bytes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper
from tests.support.networks import graph

from kedge import Release
from kedge import compile as compile_model
from kedge_targets.graph import model_writer


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its data: a convolution and eight average poolings, which ONNX Runtime's float kernels do at many times
    the speed of its integer ones."""
    rng = np.random.default_rng(0)
    weights = {
        "w0": (rng.standard_normal((24, 24, 1, 1)) * 0.2).astype(np.float32),
        "w1": (rng.standard_normal((24, 8)) * 0.3).astype(np.float32),
    }
    nodes = [helper.make_node("Conv", ["x", "w0"], ["p0"], name="first")]
    for number in range(8):
        pooled = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "name": f"pool{number}"}
        nodes.append(helper.make_node("AveragePool", [f"p{number}"], [f"p{number + 1}"], **pooled))
    nodes += [
        helper.make_node("GlobalAveragePool", ["p8"], ["g"], name="mean"),
        helper.make_node("Flatten", ["g"], ["f"], name="flat"),
        helper.make_node("MatMul", ["f", "w1"], ["y"], name="last"),
    ]
    folder = tmp_path_factory.mktemp("slower")
    model_writer.save(graph(nodes, {"x": ["N", 24, 40, 40]}, ["N", 8], weights), folder / "model.onnx")
    samples = (rng.standard_normal((40, 24, 40, 40)) * 0.5).astype(np.float32)
    np.savez(folder / "calibration.npz", x=samples[:16])
    np.savez(folder / "evaluation.npz", x=samples[16:])
    return folder


def compiled(inputs: Path, out: str, target: str = "generic-cpu", max_drop: float = 0.5, **options: Any) -> Release:
    return compile_model(
        inputs / "model.onnx",
        name="m",
        version="1",
        targets=[target],
        calibration=inputs / "calibration.npz",
        evaluation=inputs / "evaluation.npz",
        out=inputs / out,
        max_drop=max_drop,
        **options,
    )


@pytest.fixture(scope="module")
def plain(inputs: Path) -> Release:
    return compiled(inputs, "plain")


def test_int8_that_is_slower_than_float_is_not_chosen(plain: Release) -> None:
    report = plain.report
    assert report is not None
    (bundle,) = report.bundles
    assert bundle.precision in ("float32", "float16", "codebook8")
    int8 = next(one for one in bundle.attempts if one.label == "int8")
    assert any(remark.startswith("slower than float: ") for remark in int8.remarks)
    assert "slower than float" in int8.reason
    assert bundle.target_latency is not None
    assert bundle.target_latency.pace is not None
    assert not bundle.target_latency.pace.noticed(bundle.target_latency.p50)
    # What a search tries and leaves is no warning.
    assert report.warnings == []


def test_who_gives_max_size_gets_the_bytes_and_is_told_what_they_cost(inputs: Path) -> None:
    report = compiled(inputs, "bytes", max_size="0.95x").report
    assert report is not None
    (bundle,) = report.bundles
    assert bundle.precision == "int8"
    assert [one.label for one in bundle.attempts] == ["int8"]
    assert any(remark.startswith("slower than float: ") for remark in bundle.remarks)


def test_the_recipe_of_what_measurement_chose_gives_the_same_digest(inputs: Path, plain: Release) -> None:
    assert plain.report is not None
    again = compiled(inputs, "again", recipe=plain.path / "recipe.toml")
    assert again.bundles["generic-cpu"].digest == plain.bundles["generic-cpu"].digest
    assert again.report is not None
    assert len(again.report.bundles[0].attempts) == 1


def test_latencies_have_intervals_in_the_report(plain: Release) -> None:
    data = json.loads((plain.path / "report.json").read_text())
    (bundle,) = data["bundles"]
    for attempt in bundle["attempts"]:
        latency, pace = attempt["latency_ms"], attempt["target_latency"]["pace"]
        assert 0 < latency["low"] <= latency["p50"] <= latency["high"]
        assert 0 < pace["low"] <= pace["ratio"] <= pace["high"]
    page = (plain.path / "report.html").read_text()
    assert "beside float" in page
    assert bundle["target_latency"]["source"] in page


def test_recorded_latencies_give_the_same_choice_without_a_race(inputs: Path, plain: Release) -> None:
    report, before = compiled(inputs, "recorded", latencies=plain.path / "search.json").report, plain.report
    assert report is not None
    assert before is not None
    assert report.bundles[0].label == before.bundles[0].label
    known = {one.label: one.target_latency for one in before.bundles[0].attempts}
    for attempt in report.bundles[0].attempts:
        assert attempt.target_latency is not None
        assert "recorded" in attempt.target_latency.source
        recorded = known[attempt.label]
        assert recorded is not None
        assert dataclasses.replace(attempt.target_latency, source="") == dataclasses.replace(recorded, source="")


def test_a_time_limit_ends_the_search_with_the_best_so_far(inputs: Path) -> None:
    report = compiled(inputs, "limited", time_limit=0.001).report
    assert report is not None
    (bundle,) = report.bundles
    assert {"int8"} <= {one.label for one in bundle.attempts} <= {"int8", "float32"}
    assert any("the search ended after 0.001 s (--time-limit)" in remark for remark in bundle.remarks)


def test_float_of_each_backend_is_tried_where_the_time_was_up_before(inputs: Path) -> None:
    # int8 loses more than a millionth, and the time is up behind the first candidate of the first backend.
    report = compiled(inputs, "backends", "intel-cpu", max_drop=1e-6, time_limit=0.001).report
    assert report is not None
    (bundle,) = report.bundles
    tried = {(one.backend, one.label) for one in bundle.attempts}
    assert tried == {("openvino", "int8"), ("openvino", "float32"), ("onnxruntime", "float32")}
    assert bundle.precision == "float32"
