"""Folders of raw data: what is recognised, and what is said of what is wrong in them, with file and line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kedge.importing import iterables
from kedge.importing.data_folders import kinds
from kedge.importing.data_folders.listing import Truth
from kedge.importing.data_folders.npy_stream import NpyStream
from kedge_protocol.bundle.pipeline import Colour, Task
from kedge_protocol.errors import ConfigError, DatasetError
from kedge_targets.graph.signature import TensorInfo
from kedge_targets.pipeline import declaration, settling

PIXELS = (TensorInfo(name="x", shape=(None, 3, 8, 8), dtype="float32", layout="NCHW"),)
SCORES = (TensorInfo(name="y", shape=(None, 2), dtype="float32"),)


def touched(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_roles_choose_the_split(tmp_path: Path) -> None:
    touched(*(tmp_path / split / kind / "1.jpg" for split in ("train", "val") for kind in ("a", "b")))
    touched(tmp_path / "val" / "a" / "2.jpg")
    assert len(kinds.listed(tmp_path, "calibration").sources) == 2
    found = kinds.listed(tmp_path, "evaluation")
    assert (found.labels, found.classes) == ([0, 0, 1], ("a", "b"))


def test_classes_are_numbered_as_the_model_has_them(tmp_path: Path) -> None:
    touched(tmp_path / "ant" / "1.jpg", tmp_path / "bee" / "1.jpg")
    found = kinds.listed(tmp_path, "evaluation")
    assert found.under(("bee", "cow", "ant")).labels == [2, 0]
    with pytest.raises(DatasetError, match="class 'ant' is none of the model's 3"):
        found.under(("bee", "cow", "dog"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.2", r"labels/1\.txt, line 2: a class and four numbers"),
        ("0 0.5 0.5 0.2 x", r"labels/1\.txt, line 2: a class and four numbers"),
        ("0 0.5 0.5 0.2 nan", r"labels/1\.txt, line 2: a class and four numbers"),
        ("3 0.5 0.5 0.2 0.2", r"labels/1\.txt, line 2: class 3 is none of 2"),
        ("0 50 50 20 20", r"labels/1\.txt, line 2: the box lies outside the picture"),
    ],
)
def test_a_wrong_line_of_yolo_labels_is_named(line: str, message: str, tmp_path: Path) -> None:
    touched(tmp_path / "images" / "1.jpg")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "1.txt").write_text(f"0 0.5 0.5 1 1\n{line}\n", encoding="utf-8")
    (tmp_path / "data.yaml").write_text("train: images\nval: images\nnames: [a, b]\n", encoding="utf-8")
    with pytest.raises(DatasetError, match=message):
        kinds.listed(tmp_path, "evaluation")


def test_outlines_become_their_boxes(tmp_path: Path) -> None:
    touched(tmp_path / "images" / "1.jpg")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "1.txt").write_text("1 0.1 0.2 0.5 0.3 0.4 0.9\n", encoding="utf-8")
    found = kinds.listed(tmp_path, "evaluation")
    assert found.labels == [[[1.0, 0.1, 0.2, 0.5, 0.9, 0.0]]]


def test_yolo_labels_given_as_annotations_follow_their_pictures(tmp_path: Path) -> None:
    touched(tmp_path / "p" / "2.jpg", tmp_path / "p" / "1.jpg")
    (tmp_path / "boxes").mkdir()
    (tmp_path / "boxes" / "2.txt").write_text("0 0.5 0.5 1 1\n", encoding="utf-8")
    found = kinds.listed(tmp_path / "p", "evaluation", annotations=tmp_path / "boxes")
    assert found.labels == [[], [[0.0, 0.0, 0.0, 1.0, 1.0, 0.0]]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file,label\n1.wav,a\n2.wav\n", r"t\.csv, line 3: 1 columns instead of 2"),
        ("file,label\n1.wav,a\n9.wav,a\n", r"t\.csv, line 3: '9\.wav' is not there"),
        ("file,label\n1.wav,a\n2.wav,\n", r"t\.csv, line 3: the label is empty"),
        ("a,b\n1,2\n", r"t\.csv has no column of files or of texts, it has a, b"),
        ("", r"t\.csv is empty"),
    ],
)
def test_a_wrong_table_is_told_with_its_line(content: str, message: str, tmp_path: Path) -> None:
    touched(tmp_path / "1.wav", tmp_path / "2.wav")
    (tmp_path / "t.csv").write_text(content, encoding="utf-8")
    with pytest.raises(DatasetError, match=message):
        kinds.listed(tmp_path, "evaluation")


def test_lines_of_text_and_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    assert kinds.listed(tmp_path / "a.txt", "calibration").sources == ["one", "two"]
    (tmp_path / "a.jsonl").write_text('{"text": "one", "label": 1}\n{"text": 3}\n', encoding="utf-8")
    with pytest.raises(DatasetError, match=r"a\.jsonl, line 2: a string, or an object"):
        kinds.listed(tmp_path / "a.jsonl", "calibration")


def test_coco_that_names_a_missing_picture_is_refused(tmp_path: Path) -> None:
    content = {
        "images": [{"id": 1, "file_name": "9.jpg", "width": 4, "height": 4}],
        "categories": [],
        "annotations": [],
    }
    (tmp_path / "c.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DatasetError, match=r"names '9\.jpg', which lies nowhere near it"):
        kinds.listed(tmp_path / "c.json", "evaluation")


def test_items_are_picked_evenly(tmp_path: Path) -> None:
    touched(*(tmp_path / kind / f"{number}.jpg" for kind in "ab" for number in range(10)))
    picked = kinds.listed(tmp_path, "calibration").picked(4)
    assert picked.labels == [0, 0, 1, 1]
    assert picked.truth is Truth.CLASS


def test_iterables_of_samples_batches_and_pairs_are_the_same(tmp_path: Path) -> None:
    spec = TensorInfo(name="x", shape=(None, 2), dtype="float32")
    data = np.arange(12, dtype=np.float32).reshape(6, 2)
    forms = [list(data), [data[:4], data[4:]], [{"x": data}], [(row, 0) for row in data]]
    for number, form in enumerate(forms):
        (tmp_path / str(number)).mkdir()
        files = iterables.write(form, [spec], tmp_path / str(number), where="calibration")
        np.testing.assert_array_equal(np.load(files["x"]), data)
    with pytest.raises(DatasetError, match=r"calibration, item 1: 'x' has shape 3, the model takes 2"):
        iterables.write([data[0], np.zeros(3)], [spec], tmp_path, where="calibration")


def test_a_growing_npy_file_is_numpys(tmp_path: Path) -> None:
    with NpyStream(tmp_path / "a.npy", where="x") as stream:
        for number in range(3):
            stream.add(np.full((2, 2), number, np.uint8))
        with pytest.raises(DatasetError, match="sample 3 has shape 2, the first has 2x2"):
            stream.add(np.zeros(2, np.uint8))
    loaded = np.load(tmp_path / "a.npy", mmap_mode="r")
    assert loaded.shape == (3, 2, 2)
    assert loaded[2, 1, 1] == 2


def test_a_pipeline_states_what_differs_from_its_tasks(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text(
        'task = "classification"\n[picture]\nfit = "stretch"\n[normalize]\nscale = "1/255"\n', encoding="utf-8"
    )
    pipeline = declaration.read(path)
    assert pipeline.picture is not None
    assert pipeline.normalize is not None
    assert (pipeline.picture.fit.value, pipeline.picture.crop_share) == ("stretch", 0.875)
    assert pipeline.normalize.scale == (1 / 255,)
    settled = settling.settled(pipeline, PIXELS, SCORES, where="p.toml")
    assert settled.picture is not None
    assert (settled.picture.width, settled.picture.layout, settled.picture.colour) == (8, "NCHW", Colour.RGB)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "names no task"),
        ('task = "detektion"', "'detektion' is no task"),
        ('task = "detection"\n[picture]\nfitt = "crop"', "picture.fitt: unknown"),
        ('task = "detection"\n[picture]\nfill = 300', "picture.fill: 0 to 255"),
        ('task = "detection"\n[sound]\n[picture]', r"states both \[picture\] and \[sound\]"),
        ('task = "detection"\n[normalize]\nscale = "1/x"', "normalize.scale: '1/x' is no number"),
        ('task = "classification"\n[then]\nmodel = "b"', r"then: only with \[boxes\]"),
    ],
)
def test_a_wrong_pipeline_is_told_by_its_key(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        declaration.read(tmp_path / "p.toml")


def test_an_export_of_ultralytics_brings_its_pipeline() -> None:
    metadata = {"task": "detect", "stride": "32", "imgsz": "[320, 640]", "names": "{0: 'cat', 1: 'dog'}"}
    pipeline = settling.from_metadata(metadata)
    assert pipeline is not None
    assert pipeline.task is Task.DETECTION
    assert pipeline.picture is not None
    assert (pipeline.picture.width, pipeline.picture.height) == (640, 320)
    assert settling.names_of(metadata) == ("cat", "dog")
    assert settling.from_metadata({"task": "pose", "stride": "32"}) is None
    assert settling.names_of({"names": "__import__('os')"}) == ()
