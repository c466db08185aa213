"""Labels in the forms that people have them in."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kedge.evaluation.labels import read
from kedge_protocol.errors import DatasetError, KedgeError

COCO = {
    "images": [{"id": 7, "width": 100, "height": 50}, {"id": 3, "width": 10, "height": 10}],
    "categories": [{"id": 18, "name": "dog"}, {"id": 2, "name": "cat"}],
    "annotations": [
        {"image_id": 7, "category_id": 18, "bbox": [10, 5, 20, 10], "iscrowd": 0},
        {"image_id": 7, "category_id": 2, "bbox": [0, 0, 100, 50], "iscrowd": 1},
    ],
}


def test_coco_and_yolo_say_the_same(tmp_path: Path) -> None:
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(COCO), encoding="utf-8")
    folder = tmp_path / "labels"
    folder.mkdir()
    (folder / "a.txt").write_text("1 0.2 0.2 0.2 0.2\n0 0.5 0.5 1 1\n", encoding="utf-8")
    (folder / "b.txt").write_text("\n", encoding="utf-8")
    coco, yolo = read(file, 2), read(folder, 2)
    assert coco.shape == yolo.shape == (2, 2, 6)
    np.testing.assert_allclose(coco[..., :5], yolo[..., :5], atol=1e-6)
    assert coco[0, :, 5].tolist() == [0, 1]  # YOLO knows no crowds
    assert coco[1, :, 0].tolist() == [-1, -1]


def test_lines_are_class_numbers_or_texts_and_arrays_are_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("3\n0\n12\n", encoding="utf-8")
    assert read(tmp_path / "a.txt", 3).tolist() == [3, 0, 12]
    (tmp_path / "b.txt").write_text("hello world\n3\n", encoding="utf-8")
    assert read(tmp_path / "b.txt", 2).tolist() == ["hello world", "3"]
    np.save(tmp_path / "c.npy", np.ones((2, 4, 4), dtype=np.uint8))
    assert read(tmp_path / "c.npy", 2).shape == (2, 4, 4)


def test_a_table_holds_classes_numbers_or_texts(tmp_path: Path) -> None:
    def found(name: str, content: str) -> object:
        (tmp_path / name).write_text(content, encoding="utf-8")
        return read(tmp_path / name, 2).tolist()

    assert found("classes.csv", "3\n0\n") == [3, 0]
    assert found("numbers.csv", "0.5\n-1e3\n") == [0.5, -1000.0]
    assert found("several.csv", "0.5,1\n2,3\n") == [[0.5, 1.0], [2.0, 3.0]]
    assert found("hot.csv", "0,1,1\n1,0,0\n") == [[0, 1, 1], [1, 0, 0]]
    assert found("ragged.csv", "1,2\n3\n") == ["1,2", "3"]
    assert found("prices.txt", "12.50\n3.99\n") == ["12.50", "3.99"]


def test_names_of_classes_beside_yolo_boxes_are_no_picture(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("0 0.5 0.5 0.2 0.2\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("", encoding="utf-8")
    (tmp_path / "classes.txt").write_text("cat\ndog\n", encoding="utf-8")
    assert read(tmp_path, 2)[:, 0, 0].tolist() == [0, -1]


def test_each_mistake_is_named(tmp_path: Path) -> None:
    def refused(name: str, content: str, text: str, samples: int = 2) -> None:
        (tmp_path / name).write_text(content, encoding="utf-8")
        with pytest.raises(DatasetError, match=text):
            read(tmp_path / name, samples)

    refused("a.json", "{", "is no JSON")
    refused("b.json", "{}", "'images' is missing")
    refused("c.json", json.dumps(COCO), "labels of 2 samples, the evaluation set has 3", 3)
    refused("d.json", json.dumps(COCO | {"annotations": [{"image_id": 1}]}), "refers to nothing")
    refused("e.json", "[1]", "is no COCO JSON")
    refused("f.xml", "", ".xml is no form of labels")
    refused("g.npy", "x", "cannot be read")
    with pytest.raises(DatasetError, match="neither a file nor a folder"):
        read(tmp_path / "none.json", 1)
    folder = tmp_path / "yolo"
    folder.mkdir()
    with pytest.raises(DatasetError, match="holds no"):
        read(folder, 1)
    (folder / "x.txt").write_text("0 1 2\n", encoding="utf-8")
    with pytest.raises(DatasetError, match="line 1"):
        read(folder, 1)


@given(content=st.binary(max_size=200), ending=st.sampled_from([".json", ".txt", ".npy", ".csv"]))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes, ending: str) -> None:
    file = tmp_path_factory.mktemp("labels") / f"x{ending}"
    file.write_bytes(content)
    with contextlib.suppress(KedgeError):
        read(file, 1)
