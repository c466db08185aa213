"""Comparing an imported graph with its framework, and the names of free axes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from kedge.importing import agreement, axes
from kedge_protocol.errors import ModelError


def doubled(tmp_path: Path, operator: str = "Add") -> Path:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", "x"], ["y"])],
        "doubled",
        [value("x", TensorProto.FLOAT, ["s1", "s2"])],
        [value("y", TensorProto.FLOAT, ["s1", "s2"])],
    )
    path = tmp_path / "doubled.onnx"
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 18)]), path)
    return path


FEEDS = [{"x": np.arange(6, dtype=np.float32).reshape(2, 3)}]


def test_a_graph_that_agrees(tmp_path: Path) -> None:
    assert agreement.check(doubled(tmp_path), FEEDS, lambda feed: [feed["x"] * 2], where="m") == 0


def test_a_graph_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"does not compute what the model computes: output 'y'"):
        agreement.check(doubled(tmp_path, "Mul"), FEEDS, lambda feed: [feed["x"] * 2], where="m")


def test_few_samples_may_differ_where_a_model_decides_at_thresholds(tmp_path: Path) -> None:
    feeds = [{"x": np.arange(12, dtype=np.float32).reshape(4, 3)}]

    def framework(feed: Mapping[str, Any]) -> list[Any]:
        made = feed["x"] * 2
        made[1] += 5
        return [made]

    assert agreement.check(doubled(tmp_path), feeds, framework, where="m", at_thresholds=0.25) == 1
    for share in (0.0, 0.2):
        with pytest.raises(ModelError, match=r"does not compute what the model computes: output 'y' is 0\.2"):
            agreement.check(doubled(tmp_path), feeds, framework, where="m", at_thresholds=share)
    with pytest.raises(ModelError, match="output 'y' is inf off"):
        agreement.check(doubled(tmp_path), feeds, lambda feed: [feed["x"][:, :2]], where="m", at_thresholds=1.0)


@pytest.mark.parametrize(
    ("mine", "theirs", "apart"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.2], [1.0, 2.0], 0.1),
        ([np.nan, 2.0], [np.nan, 2.0], 0.0),
        ([np.nan, 2.0], [1.0, 2.0], np.inf),
        ([np.inf, 2.0], [-np.inf, 2.0], np.inf),
        ([1.0], [1.0, 2.0], np.inf),
        ([], [], 0.0),
    ],
)
def test_differences(mine: list[float], theirs: list[float], apart: float) -> None:
    assert agreement.difference(np.array(mine), np.array(theirs)) == pytest.approx(apart)


def test_free_axes_are_tried_with_other_lengths() -> None:
    shapes: dict[str, list[int | str]] = {"ids": ["batch", "sequence"], "scale": ["batch", 1]}
    feeds = agreement.varied(["ids", "scale"], [np.zeros((2, 7)), np.zeros((2, 1))], shapes)
    found = {tuple(array.shape for array in feed.values()) for feed in feeds}
    assert found == {((2, 7), (2, 1)), ((1, 7), (1, 1)), ((3, 7), (3, 1)), ((2, 6), (2, 1))}


def graph(inputs: dict[str, list[Any]], outputs: dict[str, list[Any]]) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    made = helper.make_graph(
        [],
        "axes",
        [value(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [value(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
    )
    return helper.make_model(made)


def shape(model: onnx.ModelProto, at: int = 0) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in model.graph.output[at].type.tensor_type.shape.dim]


def test_names_of_free_axes() -> None:
    model = graph({"ids": ["s23", "s27"], "mask": ["s23", "s27"]}, {"y": ["s23", 3], "z": ["s23", "2*s27"]})
    assert axes.rename_axes(model, {"s27": "sequence"}) == ("batch", "sequence")
    assert shape(model) == ["batch", 3]
    assert shape(model, 1) == ["batch", "2*sequence"]


def test_an_axis_without_a_name_gets_one() -> None:
    model = graph({"ids": ["unk__1", "unk__2"]}, {"y": ["unk__9", 3]})
    assert axes.rename_axes(model) == ("batch", "ids_1")
    assert shape(model) == ["batch", 3]


def test_fixed_axes_stay_fixed() -> None:
    model = graph({"x": [1, 3]}, {"y": [1, 3]})
    assert axes.rename_axes(model) == ()
    assert shape(model) == [1, 3]
