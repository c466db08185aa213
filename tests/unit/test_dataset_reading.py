"""Data sets as users give them: .npz and folders, good and bad."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kedge.evaluation.dataset import Dataset
from kedge_protocol.errors import DatasetError
from kedge_targets.graph.signature import TensorInfo

IMAGE = TensorInfo(name="pixels", shape=(None, 4, 4, 3), dtype="float32", layout="NHWC")
TOKENS = TensorInfo(name="tokens", shape=(None, None), dtype="int64")


def images(count: int = 12) -> np.ndarray:
    return np.random.default_rng(3).normal(size=(count, 4, 4, 3)).astype(np.float32)


def saved(folder: Path, **arrays: np.ndarray) -> Path:
    path = folder / "set.npz"
    np.savez(path, **arrays)
    return path


def opened(path: Path, folder: Path) -> Dataset:
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    return Dataset(path, scratch, role="evaluation")


@pytest.mark.parametrize("name", ["pixels", "input"])
def test_the_only_input_goes_by_its_name_or_by_input(tmp_path: Path, name: str) -> None:
    data = opened(saved(tmp_path, **{name: images(), "label": np.arange(12)}), tmp_path).bind([IMAGE])
    assert data.samples == 12
    assert np.array_equal(np.load(data.arrays["pixels"]), images())
    assert data.label is not None
    assert np.array_equal(np.load(data.label), np.arange(12))


def test_a_compressed_npz_is_read_too(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "c.npz", input=images())
    data = opened(tmp_path / "c.npz", tmp_path).bind([IMAGE])
    assert np.array_equal(np.load(data.arrays["pixels"]), images())


def test_arrays_are_mapped_and_not_loaded(tmp_path: Path) -> None:
    dataset = opened(saved(tmp_path, input=images()), tmp_path)
    assert isinstance(dataset.arrays["input"], np.memmap)


def test_a_folder_of_npy_files_is_used_where_it_lies(tmp_path: Path) -> None:
    np.save(tmp_path / "pixels.npy", images())
    data = opened(tmp_path, tmp_path).bind([IMAGE])
    assert data.arrays["pixels"] == str(tmp_path / "pixels.npy")
    assert data.label is None


def test_npz_and_folder_of_the_same_arrays_have_one_digest(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    np.save(folder / "pixels.npy", images())
    np.save(folder / "label.npy", np.arange(12))
    digests = set()
    for number, path in enumerate((saved(tmp_path, input=images(), label=np.arange(12)), folder)):
        (tmp_path / str(number)).mkdir()
        dataset = opened(path, tmp_path / str(number))
        dataset.bind([IMAGE])
        digests.add(dataset.scan().digest(dataset.names))
    assert len(digests) == 1


def test_another_value_gives_another_digest(tmp_path: Path) -> None:
    digests = set()
    for number in range(2):
        array = images()
        array[11, 3, 3, 2] += number
        folder = tmp_path / str(number)
        folder.mkdir()
        dataset = opened(saved(folder, input=array), folder)
        dataset.bind([IMAGE])
        digests.add(dataset.scan().digest(dataset.names))
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"foo": images()}, "no array for input 'pixels'"),
        ({"pixels": images(), "extra": images()}, "'extra' is no input"),
        ({"input": images()[:, :3]}, "shape 12x3x4x3, the model takes samplesx4x4x3"),
        ({"input": images().reshape(12, -1)}, "shape 12x48"),
        ({"input": images().astype(np.complex64)}, "complex64, which is not numeric"),
        ({"input": images().astype(str)}, "not numeric"),
    ],
)
def test_arrays_that_do_not_fit_are_named(tmp_path: Path, arrays: dict[str, np.ndarray], said: str) -> None:
    with pytest.raises(DatasetError, match=said):
        opened(saved(tmp_path, **arrays), tmp_path).bind([IMAGE])


def test_fractions_do_not_fit_an_integer_input(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="float64, the model's input takes int64"):
        opened(saved(tmp_path, input=np.ones((9, 5))), tmp_path).bind([TOKENS])


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float64, np.bool_])
def test_raw_samples_may_have_any_numeric_dtype(tmp_path: Path, dtype: type) -> None:
    data = opened(saved(tmp_path, input=np.ones((9, 4, 4, 3), dtype)), tmp_path).bind([IMAGE])
    assert data.samples == 9


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"input": images(0)}, "'input' has no samples"),
        ({"input": np.float32(3.0)}, "'input' has shape one number, the model takes samplesx4x4x3"),
        ({"input": images(12), "label": np.arange(11)}, "different numbers of samples: input 12, label 11"),
        ({"input": np.array([object()], dtype=object)}, "Python objects"),
        ({}, "holds no array"),
    ],
)
def test_arrays_that_are_no_samples_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], said: str) -> None:
    with pytest.raises(DatasetError, match=said):
        opened(saved(tmp_path, **arrays), tmp_path).bind([IMAGE])


def test_what_is_no_npz_is_said_so(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    path.write_bytes(b"not a zip")
    with pytest.raises(DatasetError, match=r"is no \.npz"):
        opened(path, tmp_path)


def test_a_missing_path_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="neither a file nor a folder"):
        opened(tmp_path / "absent", tmp_path)


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "input.npy", images())
    raw = (tmp_path / "input.npy").read_bytes()
    (tmp_path / "input.npy").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(DatasetError, match="'input' cannot be read"):
        opened(tmp_path, tmp_path)
