"""Which layers of a bundle the benchmark of peers tells a quantizer by hand to leave in float."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from benchmarks import float_layers
from tests.support import lowering

from kedge_targets.numerics import Plan, Precision


@pytest.mark.parametrize(
    ("kept", "floating"),
    [
        ((), []),
        (("second",), ["second", "second_relu"]),
        (("first", "last"), ["first", "first_relu", "pool", "flat", "last"]),
    ],
)
def test_nodes_that_no_integers_lead_through_are_named(
    tmp_path: Path, kept: tuple[str, ...], floating: list[str]
) -> None:
    model = lowering.classifier()
    onnx.save(model, str(tmp_path / "model.onnx"))
    graph = lowering.checked_copy(tmp_path / "model.onnx", tmp_path)
    plan = Plan(default=Precision.INT8, layers=dict.fromkeys(kept, Precision.FLOAT32))
    made = lowering.lower("generic-cpu", graph, plan, lowering.Calibration("image", lowering.images(8)), tmp_path / "x")
    found = float_layers.of_bundle(made.files[made.entry], tmp_path / "model.onnx", ())
    assert found == floating


def test_of_a_file_without_the_nodes_names_the_report_tells(tmp_path: Path) -> None:
    assert float_layers.of_bundle(tmp_path / "model.xml", tmp_path / "model.onnx", ["last"]) == ["last"]
