"""Tables whose columns are the model's own inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kedge.importing.data_folders import columns, kinds
from kedge.importing.data_folders.npy_stream import NpyStream
from kedge_protocol.errors import DatasetError
from kedge_targets.graph.signature import TensorInfo

TABLE = "town,age,label\nBerlin,31,yes\nKöln,7,no\n"


def written(path: Path, text: str = TABLE) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def info(name: str, *shape: int | None, dtype: str = "float32") -> TensorInfo:
    return TensorInfo(name=name, shape=shape, dtype=dtype)


def test_columns_go_by_name_and_the_others_are_left(tmp_path: Path) -> None:
    read = columns.read(written(tmp_path / "t.csv"), where="t")
    assert {name: array.dtype.kind for name, array in read.arrays().items()} == {"town": "U", "age": "i", "label": "U"}
    made = read.fitted([info("age", None, 1, dtype="int64"), info("town", None, 1, dtype="str")], where="t")
    assert made["age"].tolist() == [[31], [7]]
    assert made["town"].tolist() == [["Berlin"], ["Köln"]]
    assert read.fitted([info("age", None)], where="t")["age"].tolist() == [31, 7]


def test_one_input_takes_all_columns_in_their_order(tmp_path: Path) -> None:
    read = columns.read(written(tmp_path / "t.csv", "b,a,target\n1,2.5,0\n3,4,1\n"), where="t")
    assert read.fitted([info("x", None, 2)], where="t")["x"].tolist() == [[1.0, 2.5], [3.0, 4.0]]
    assert read.labels is not None
    assert read.labels.tolist() == [0, 1]
    texts = read.fitted([info("x", None, 2, dtype="str")], where="t")["x"]
    assert texts.tolist() == [["1", "2.5"], ["3", "4"]]


def test_empty_cells_are_missing_numbers(tmp_path: Path) -> None:
    read = columns.read(written(tmp_path / "t.csv", "age,town,label\n31,,1\n,Bonn,0\nNA,Ulm,0\n"), where="t")
    made = read.arrays()
    assert np.array_equal(made["age"], [31, np.nan, np.nan], equal_nan=True)
    assert made["town"].tolist() == ["", "Bonn", "Ulm"]
    assert np.isnan(read.fitted([info("age", None)], where="t")["age"]).tolist() == [False, True, True]
    with pytest.raises(DatasetError, match=r"line 3: '' in column 'age' is no whole number"):
        read.fitted([info("age", None, dtype="int64")], where="t")


def test_a_cell_that_is_no_number_is_told_with_its_line(tmp_path: Path) -> None:
    read = columns.read(written(tmp_path / "t.csv"), where="evaluation t.csv")
    with pytest.raises(DatasetError, match=r"t.csv, line 2: 'Berlin' in column 'town' is no number"):
        read.fitted([info("x", None, 2)], where="evaluation t.csv")
    with pytest.raises(DatasetError, match="columns town, age are not what the model takes: x \\?x3, y \\?"):
        read.fitted([info("x", None, 3), info("y", None)], where="t")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,a\n1,2\n", "two columns 'a'"),
        ("a,b\n1\n", "line 2: 1 columns instead of 2"),
        ("a,b\n", "no line below its header"),
        ("a,label\nx,p\ny,\n", "line 3: the label is empty"),
        ("label\nx\n", "no column beside the labels"),
    ],
)
def test_a_broken_table_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(DatasetError, match=said):
        columns.read(written(tmp_path / "t.csv", text), where="t")


def test_tables_that_name_files_are_none(tmp_path: Path) -> None:
    assert columns.is_columns(written(tmp_path / "t.csv"))
    assert not columns.is_columns(written(tmp_path / "files.csv", "file,label\na.png,1\n"))
    assert columns.is_columns(written(tmp_path / "people.csv", "name,age\nAnna,1\n"))
    assert kinds.columns_file(tmp_path, "calibration") is None  # three tables, none of the role's name
    folder = tmp_path / "data"
    folder.mkdir()
    written(folder / "train.csv")
    written(folder / "val.csv")
    assert kinds.columns_file(folder, "evaluation") == folder / "val.csv"
    (folder / "a.png").touch()
    assert kinds.columns_file(folder, "evaluation") is None


def test_lines_of_text_are_a_column(tmp_path: Path) -> None:
    lines = written(tmp_path / "t.jsonl", '{"text": "a", "label": "x"}\n{"text": "bc", "label": "y"}\n'
                                          '{"text": "d", "label": "x"}\n')  # fmt: skip
    read = columns.read(lines, where="t")
    assert read.arrays()["label"].tolist() == ["x", "y", "x"]
    assert read.fitted([info("t", None, dtype="str")], where="t")["t"].tolist() == ["a", "bc", "d"]


def test_a_stream_takes_texts_of_any_length(tmp_path: Path) -> None:
    texts = ["a", "bc", "", "d" * 50, "ef", "ü" * 70]
    with NpyStream(tmp_path / "t.npy", where="t") as stream:
        for text in texts:
            stream.add(np.array(text))
    assert np.load(tmp_path / "t.npy").tolist() == texts
