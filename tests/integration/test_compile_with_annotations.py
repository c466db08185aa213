"""``--annotations``: labels in the forms of the field decide what a bundle is judged by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import kedge
from kedge_protocol.errors import ConfigError, DatasetError

PICTURES, CLASSES, ANCHORS = 24, 2, 8


@pytest.fixture
def detector(tmp_path: Path) -> Path:
    """A picture of 6 x 8 pixels that is its own table of boxes: a convolution of ones passes it on."""
    weight = numpy_helper.from_array(np.ones((1, 1, 1, 1), dtype=np.float32), "w")
    shape = numpy_helper.from_array(np.asarray([0, 4 + CLASSES, ANCHORS], dtype=np.int64), "shape")
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("Reshape", ["c", "shape"], ["boxes"])]
    graph = helper.make_graph(
        nodes,
        "detector",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, 4 + CLASSES, ANCHORS])],
        [helper.make_tensor_value_info("boxes", TensorProto.FLOAT, ["n", 4 + CLASSES, ANCHORS])],
        [weight, shape],
    )
    path = tmp_path / "detector.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def drawn(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Pictures, and COCO's annotations of which the second class is wrong in each third picture."""
    rng = np.random.default_rng(0)
    pictures = np.zeros((PICTURES, 1, 4 + CLASSES, ANCHORS), dtype=np.float32)
    annotations = []
    for number in range(PICTURES):
        for anchor, kind in enumerate((0, 1)):
            centre, side = 0.25 + 0.5 * anchor + rng.uniform(-0.05, 0.05, 2), rng.uniform(0.2, 0.3, 2)
            pictures[number, 0, :4, anchor] = (*centre, *side)
            pictures[number, 0, 4 + kind, anchor] = 0.9
            told = kind if number % 3 or not kind else 0
            corner = (centre - side / 2) * 100
            box = [*corner, *(side * 100)]
            annotations.append({"image_id": number, "category_id": 7 + told, "bbox": [float(one) for one in box]})
    np.savez(folder / "pictures.npz", x=pictures)
    coco = {
        "images": [{"id": number, "width": 100, "height": 100} for number in range(PICTURES)],
        "categories": [{"id": 7, "name": "a"}, {"id": 8, "name": "b"}],
        "annotations": annotations,
    }
    return folder / "pictures.npz", coco


def compiled(model: Path, data: Path, out: Path, **options: Any) -> Any:
    return kedge.compile(
        model,
        name="boxes",
        version="1",
        targets=["generic-cpu"],
        calibration=data,
        evaluation=data,
        out=out,
        effort="quick",
        **options,
    )


def test_boxes_of_coco_json_make_mean_average_precision_the_metric(detector: Path, tmp_path: Path) -> None:
    data, coco = drawn(tmp_path)
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(coco), encoding="utf-8")
    report = compiled(detector, data, tmp_path / "out", annotations=file).report
    assert report.metric == "map"
    # Class a: 8 of its 32 objects are never found as such. Class b: a third of its detections hit nothing.
    assert 0.5 < report.reference.value < 0.8
    assert abs(report.bundles[0].drop) <= 0.01


def test_a_metric_that_needs_what_is_not_there_is_refused_before_the_long_work(detector: Path, tmp_path: Path) -> None:
    data, _ = drawn(tmp_path)
    with pytest.raises(ConfigError, match="map needs labels"):
        compiled(detector, data, tmp_path / "out", metric="map")
    with pytest.raises(ConfigError, match=r"no metric 'mpa'[^!]+map50"):
        compiled(detector, data, tmp_path / "out", metric="mpa")
    short = tmp_path / "short.txt"
    short.write_text("1\n2\n", encoding="utf-8")
    with pytest.raises(DatasetError, match="labels of 2 samples, the evaluation set has 24"):
        compiled(detector, data, tmp_path / "out", annotations=short)
    assert not (tmp_path / "out").exists()
