"""Folders as tools and data sets of others write them: where their pictures lie, what lies beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kedge.importing import iterables
from kedge.importing.data_folders import columns, converting, kinds, tables
from kedge.importing.data_folders.converting import ConvertRequest
from kedge_protocol.errors import DatasetError
from kedge_targets.graph.signature import TensorInfo
from kedge_targets.pipeline import declaration, settling

PIXELS = (TensorInfo(name="x", shape=(None, 3, 8, 8), dtype="float32", layout="NCHW"),)
SCORES = (TensorInfo(name="y", shape=(None, 2), dtype="float32"),)


def touched(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def coco(path: Path, names: list[str], categories: list[dict[str, Any]], kinds_of_boxes: list[int]) -> None:
    content = {
        "images": [{"id": n, "file_name": name, "width": 10, "height": 10} for n, name in enumerate(names)],
        "categories": categories,
        "annotations": [
            {"id": n, "image_id": 0, "category_id": kind, "bbox": [1, 1, 2, 2]} for n, kind in enumerate(kinds_of_boxes)
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


RED = [{"id": 1, "name": "red"}]


@pytest.mark.parametrize("inner", ["train2017 val2017", "images/train images/val", "images/train2017 images/val2017"])
def test_coco_takes_the_pictures_of_its_own_split(inner: str, tmp_path: Path) -> None:
    """Two splits may number their pictures alike."""
    for folder in inner.split():
        touched(tmp_path / folder / "0.jpg")
        coco(tmp_path / "annotations" / f"instances_{Path(folder).name}.json", ["0.jpg"], RED, [1])
    for role, folder in zip(("calibration", "evaluation"), inner.split(), strict=True):
        assert kinds.listed(tmp_path, role).sources == [tmp_path / folder / "0.jpg"]


def test_a_category_that_only_groups_the_others_is_no_class(tmp_path: Path) -> None:
    group = {"id": 0, "name": "fruit", "supercategory": "none"}
    fruits = [{"id": n, "name": name, "supercategory": "fruit"} for n, name in ((1, "apple"), (2, "pear"))]
    touched(tmp_path / "0.jpg")
    coco(tmp_path / "a.json", ["0.jpg"], [group, *fruits], [2])
    found = kinds.listed(tmp_path / "a.json", "evaluation")
    assert (found.classes, found.labels[0][0][0]) == (("apple", "pear"), 1.0)
    coco(tmp_path / "a.json", ["0.jpg"], [group, *fruits], [2, 0])
    assert kinds.listed(tmp_path / "a.json", "evaluation").classes == ("fruit", "apple", "pear")


def yolo(folder: Path, yaml: str | None, name: str = "data.yaml") -> None:
    for split in ("train", "val"):
        touched(folder / "images" / split / f"{split} 1.jpg")
        (folder / "labels" / split).mkdir(parents=True)
        (folder / "labels" / split / f"{split} 1.txt").write_text("0 0.5 0.5 0.5 0.5\n", encoding="utf-8")
    if yaml is not None:
        (folder / name).write_text(yaml, encoding="utf-8")


NAMED = "train: images/train\nval: images/val\nnames: [a, b]\n"


@pytest.mark.parametrize(("yaml", "name"), [(None, ""), (NAMED, "data.yaml"), (NAMED, "coco8.yaml")])
def test_yolo_without_a_usual_data_yaml_keeps_its_splits_apart(yaml: str | None, name: str, tmp_path: Path) -> None:
    yolo(tmp_path, yaml, name)
    assert [one.name for one in kinds.listed(tmp_path, "calibration").sources] == ["train 1.jpg"]
    assert [one.name for one in kinds.listed(tmp_path, "evaluation").sources] == ["val 1.jpg"]


def test_a_list_of_pictures_may_name_paths_with_spaces(tmp_path: Path) -> None:
    yolo(tmp_path, "train: train.txt\nval: train.txt\nnames: [a]\n")
    (tmp_path / "train.txt").write_text("./images/train/train 1.jpg\n\n", encoding="utf-8")
    assert [one.name for one in kinds.listed(tmp_path, "evaluation").sources] == ["train 1.jpg"]


def test_a_data_yaml_without_val_says_what_to_do(tmp_path: Path) -> None:
    yolo(tmp_path, "train: images/train\nnames: [a]\n")
    with pytest.raises(DatasetError, match=r"names no val or valid or test.*give a folder of pictures"):
        kinds.listed(tmp_path, "evaluation")


def test_a_box_at_the_edge_is_cut_off(tmp_path: Path) -> None:
    """Ultralytics checks centre and size alone."""
    yolo(tmp_path, NAMED)
    (tmp_path / "labels" / "val" / "val 1.txt").write_text("\ufeff1 0.95 0.5 0.2 0.5\n", encoding="utf-8")
    assert kinds.listed(tmp_path, "evaluation").labels == [[[1.0, pytest.approx(0.85), 0.25, 1.0, 0.75, 0.0]]]


def test_splits_are_found_whatever_their_case_and_a_lone_one_is_told(tmp_path: Path) -> None:
    touched(tmp_path / "Training" / "a" / "1.jpg", tmp_path / "Training" / "b" / "1.jpg")
    with pytest.raises(DatasetError, match=r"holds Training, and none of val.*Name another folder"):
        kinds.listed(tmp_path, "evaluation")
    touched(tmp_path / "Test" / "a" / "1.jpg", tmp_path / "Test" / "b" / "1.jpg", tmp_path / "__MACOSX" / "x")
    assert kinds.listed(tmp_path, "evaluation").sources[0].parts[-3] == "Test"


def test_a_train_among_classes_is_a_class(tmp_path: Path) -> None:
    touched(*(tmp_path / kind / "1.jpg" for kind in ("bus", "car", "train")))
    assert kinds.listed(tmp_path, "calibration").classes == ("bus", "car", "train")


@pytest.mark.parametrize("name", ["README.txt", "labels.txt", "classes.csv"])
def test_what_lies_beside_class_folders_is_not_the_data(name: str, tmp_path: Path) -> None:
    touched(tmp_path / "ant" / "1.jpg", tmp_path / "bee" / "1.jpg")
    (tmp_path / name).write_text("id,name\n0,ant\n1,bee\n", encoding="utf-8")
    assert kinds.listed(tmp_path, "calibration").kind == "pictures in class folders"


def test_a_folder_of_unknown_files_is_told_with_one_of_them(tmp_path: Path) -> None:
    touched(tmp_path / "scan.tif")
    with pytest.raises(DatasetError, match=r"nothing that is known, its first file is scan\.tif"):
        kinds.listed(tmp_path, "calibration")


def test_a_column_of_files_is_found_by_what_it_holds_and_they_may_lie_beside_the_table(tmp_path: Path) -> None:
    """As ESC-50 and UrbanSound8K have it."""
    touched(tmp_path / "audio" / "1.wav", tmp_path / "audio" / "2.wav")
    (tmp_path / "meta").mkdir()
    table = tmp_path / "meta" / "sounds.csv"
    table.write_text("slice_file_name,fold,class\n1.wav,1,dog\n2.wav,1,dog\n", encoding="utf-8")
    assert not columns.is_columns(table)
    found = kinds.listed(table, "evaluation")
    assert (found.sources[1], found.classes) == (tmp_path / "audio" / "2.wav", ("dog",))


def test_a_table_named_after_its_role_beside_the_folders_of_files_is_taken(tmp_path: Path) -> None:
    for split in ("train", "val"):
        touched(tmp_path / split / "1.wav", tmp_path / split / "2.wav")
        (tmp_path / f"{split}.csv").write_text(f"file,label\n{split}/1.wav,a\n2.wav,a\n", encoding="utf-8")
    found = kinds.listed(tmp_path, "evaluation")
    assert (found.kind, found.labels) == ("sounds with a table", [0, 0])
    assert found.sources == [tmp_path / "val" / "1.wav", tmp_path / "val" / "2.wav"]


def test_places_of_files_are_looked_up_once_for_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touched(*(tmp_path / f"{number}.wav" for number in range(30)))
    rows = "".join(f"{number}.wav,{number % 2}\n" for number in range(30))
    (tmp_path / "a.csv").write_text(f"file,label\n{rows}", encoding="utf-8")
    listed, calls = Path.iterdir, []
    monkeypatch.setattr(Path, "iterdir", lambda self: calls.append(self) or listed(self))
    assert len(tables.read(tmp_path / "a.csv", where="x").sources) == 30
    assert len(calls) == 1


def test_a_text_may_hold_separators_of_unicode(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffone\u2028more\r\n\n two\n", encoding="utf-8")
    assert kinds.listed(tmp_path / "a.txt", "calibration").sources == ["one\u2028more", " two"]


def test_a_table_in_another_encoding_is_told_how_to_be_saved(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("text,label\nschön,1\n".encode("latin-1"))
    with pytest.raises(DatasetError, match="Save it as UTF-8"):
        kinds.listed(tmp_path / "a.csv", "calibration")


def test_all_damaged_pictures_are_named_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    folder.mkdir()
    for number in range(6):
        Image.new("RGB", (8, 8)).save(folder / f"{number}.png")
    for number in (2, 4):
        (folder / f"{number}.png").write_bytes((folder / f"{number}.png").read_bytes()[:40])
    declared = declaration.declared({"task": "classification"}, where="p")
    pipeline = settling.settled(declared, PIXELS, SCORES, where="p")
    request = ConvertRequest(
        path=str(folder), role="calibration", pipeline=pipeline, inputs=PIXELS, folder=str(tmp_path)
    )
    with pytest.raises(DatasetError, match=r"2\.png: .*; 2 of 5 are damaged: 2\.png, 4\.png"):
        converting.convert(request, lambda *_: None)


@pytest.mark.parametrize("place", ["p", "p/ant", "p/ant/inner"])
def test_files_that_no_pipeline_reads_are_told(place: str, tmp_path: Path) -> None:
    for inner in ("", "ant", "bee") if place != "p" else ("",):
        (tmp_path / "p" / inner).mkdir(parents=True, exist_ok=True)
        if inner or place == "p":
            Image.new("RGB", (8, 8)).save(tmp_path / "p" / inner / "0.png")
    touched(tmp_path / place / "a.GIF", tmp_path / place / "Thumbs.db")
    declared = declaration.declared({"task": "classification"}, where="p")
    pipeline = settling.settled(declared, PIXELS, SCORES, where="p")
    request = ConvertRequest(
        path=str(tmp_path / "p"), role="calibration", pipeline=pipeline, inputs=PIXELS, folder=str(tmp_path)
    )
    assert converting.convert(request, lambda *_: None).left_out == "a.GIF"


def test_items_of_loaders_give_their_labels(tmp_path: Path) -> None:
    """A ``TensorDataset`` without labels gives lists of one, Hugging Face's data sets give mappings."""
    pixels = np.zeros((2, 3, 8, 8), np.float32)
    (tmp_path / "a").mkdir()
    assert set(iterables.write([[pixels]], PIXELS, tmp_path / "a", where="x")) == {"x"}
    for number, name in enumerate(("label", "labels")):
        folder = tmp_path / str(number)
        folder.mkdir()
        files = iterables.write([{"x": pixels, name: np.array([1, 0])}], PIXELS, folder, where="x")
        assert np.load(files["label"]).tolist() == [1, 0]
    with pytest.raises(DatasetError, match="has no 'x', it has pixel_values"):
        iterables.write([{"pixel_values": pixels}], PIXELS, tmp_path / "a", where="x")
    with pytest.raises(DatasetError, match=r"item 0: no array can be made of it: .*Give mappings by the inputs' names"):
        iterables.write([(pixels, [1, 0], ["a.jpg", "b.jpg"])], PIXELS, tmp_path / "a", where="x")


BOXES = {"images": [{"id": 3, "file_name": "a.jpg", "width": 10, "height": 10}], "categories": RED}


def annotated(folder: Path, **annotation: Any) -> list[Any]:
    touched(folder / "a.jpg")
    content = {**BOXES, "annotations": [{"id": 1, "image_id": 3, "category_id": 1, **annotation}]}
    (folder / "a.json").write_text("\ufeff" + json.dumps(content), encoding="utf-8")
    found = kinds.listed(folder, "evaluation").labels[0]
    return [[round(value, 6) for value in row] for row in found]


def test_coco_with_a_byte_order_mark_keeps_its_boxes_and_they_end_with_the_picture(tmp_path: Path) -> None:
    assert annotated(tmp_path, bbox=[-1, 5, 4, 50], iscrowd=1) == [[0.0, 0.0, 0.5, 0.3, 1.0, 1.0]]


def test_coco_with_outlines_alone_gives_the_boxes_around_them(tmp_path: Path) -> None:
    outlines = [[1, 2, 3, 2, 3, 4], [5, 1, 6, 1, 6, 3]]
    assert annotated(tmp_path, segmentation=outlines) == [[0.0, 0.1, 0.1, 0.6, 0.4, 0.0]]
    with pytest.raises(DatasetError, match=r"annotations\[0\]: bbox None of a picture of 10x10 is no box"):
        annotated(tmp_path, segmentation={"counts": [4], "size": [10, 10]})


@pytest.mark.parametrize("box", [[1, 1, -2, 2], [float("nan"), 1, 2, 2], [1, 1, float("inf"), 2]])
def test_a_box_of_no_size_is_told_with_its_annotation(box: list[float], tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"annotations\[0\]: bbox .* is no box: x, y, width and height in pixels"):
        annotated(tmp_path, bbox=box)


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        ('names:\n  "0": a\n  "1": b\n', ("a", "b")),
        ("names:\n  1: b\n  0: a\n", ("a", "b")),
        ("nc: 2\n", ("class_0", "class_1")),
    ],
)
def test_classes_of_a_data_yaml_as_tools_write_them(names: str, classes: tuple[str, ...], tmp_path: Path) -> None:
    yolo(tmp_path, f"train: images\\train\nval: images\\val\n{names}")
    (tmp_path / "labels" / "val" / "val 1.txt").write_text("1.0 0.5 0.5 0.5 0.5\n", encoding="utf-8")
    found = kinds.listed(tmp_path, "evaluation")
    assert (found.classes, found.labels[0][0][0]) == (classes, 1.0)


def sounds(folder: Path, table: bytes) -> list[tuple[str, Any]]:
    touched(folder / "a.wav", folder / "inner" / "B.WAV")
    (folder / "sounds.csv").write_bytes(table)
    found = kinds.listed(folder / "sounds.csv", "evaluation")
    return [(Path(one).name, found.classes[label]) for one, label in zip(found.sources, found.labels, strict=True)]


@pytest.mark.parametrize(
    "table",
    [
        b"file,label\na.wav,x\ninner\\B.WAV,y\na.wav,x\n",
        b"file|labels\r\na|x\r\nB|y\r\na|x\r\n",
        "file\ty\r\na.wav\tx\r\nB.WAV\ty\r\na.wav\tx\r\n".encode("utf-16"),
    ],
)
def test_tables_of_files_from_windows(table: bytes, tmp_path: Path) -> None:
    assert sounds(tmp_path, table) == [("a.wav", "x"), ("B.WAV", "y"), ("a.wav", "x")]


def test_a_table_without_a_header_loses_no_line(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"sounds\.csv has no header, its first line is a\.wav, x"):
        sounds(tmp_path, b"a.wav,x\nB.WAV,y\n")
    (tmp_path / "numbers.csv").write_text("1.5,2,0\n2.5,3,1\n", encoding="utf-8")
    with pytest.raises(DatasetError, match=r"numbers\.csv has no header, its first line is 1\.5, 2, 0"):
        columns.read(tmp_path / "numbers.csv", where="x")


@pytest.mark.parametrize("name", ["", "Unnamed: 0"])
def test_row_numbers_of_pandas_are_no_column(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"{name},a,b,label\n7,1,2,0\n3,4,5,1\n", encoding="utf-8")
    assert list(columns.read(tmp_path / "a.csv", where="x").cells) == ["a", "b"]
    (tmp_path / "a.csv").write_text(f"{name},a,b,label\n7,1,2,0\n7,4,5,1\n", encoding="utf-8")
    assert len(columns.read(tmp_path / "a.csv", where="x").cells) == 3


def test_lines_of_text_may_be_utf_16(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("schön\n\nzwei\n", encoding="utf-16")
    assert kinds.listed(tmp_path / "a.txt", "calibration").sources == ["schön", "zwei"]
