"""Data sets whose samples differ in length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kedge.evaluation.dataset import Dataset
from kedge.evaluation.samples import PreprocessedSamples, Samples
from kedge.importing import iterables
from kedge_protocol import golden
from kedge_protocol.errors import BundleError, DatasetError
from kedge_protocol.golden import Golden, Tolerance
from kedge_targets import free_lengths
from kedge_targets.graph.signature import TensorInfo

SAMPLES = [np.arange(length * 2, dtype=np.float32).reshape(length, 2) + length for length in (3, 3, 1, 5, 5)]
INPUT = TensorInfo(name="x", shape=(None, None, 2), dtype="float32")


def folder_of_files(root: Path) -> Path:
    (root / "x").mkdir(parents=True)
    for number, one in enumerate(SAMPLES):
        np.save(root / "x" / f"{number:03d}.npy", one)
    np.save(root / "label.npy", np.arange(5))
    return root


def filled_array(root: Path) -> Path:
    root.mkdir()
    made = np.stack([free_lengths.filled(one[None], (6, 2))[0] for one in SAMPLES])
    made[0, 3:] = 77  # what is beyond a sample's length is nobody's
    arrays: dict[str, Any] = {"x": made, "x.lengths": [len(one) for one in SAMPLES], "label": np.arange(5)}
    np.savez(root / "d.npz", **arrays)
    return root / "d.npz"


def read(path: Path, scratch: Path, inputs: list[TensorInfo] | None = None) -> tuple[Samples, str]:
    scratch.mkdir()
    dataset = Dataset(path, scratch, role="calibration")
    scan = dataset.scan()
    data = dataset.bind(inputs or [INPUT])
    return Samples(data), scan.digest(dataset.names)


def test_a_folder_of_files_and_a_filled_array_are_the_same_data(tmp_path: Path) -> None:
    found, digests = [], set()
    for number, path in enumerate((folder_of_files(tmp_path / "a"), filled_array(tmp_path / "b"))):
        samples, digest = read(path, tmp_path / f"scratch-{number}")
        digests.add(digest)
        found.append([one["x"] for one in PreprocessedSamples(samples, [INPUT], {})])
        assert samples.label is not None
        assert samples.label.tolist() == [0, 1, 2, 3, 4]
    assert len(digests) == 1
    for one, other, wanted in zip(*found, SAMPLES, strict=True):
        assert np.array_equal(one[0], wanted)
        assert np.array_equal(other[0], wanted)


def test_batches_hold_samples_of_one_length(tmp_path: Path) -> None:
    samples, _ = read(folder_of_files(tmp_path / "a"), tmp_path / "scratch")
    shapes = [one["x"].shape for one in PreprocessedSamples(samples, [INPUT], {}).batches(4)]
    assert shapes == [(2, 3, 2), (1, 1, 2), (1, 5, 2), (1, 5, 2)]


def test_an_iterable_gives_samples_of_unlike_length(tmp_path: Path) -> None:
    files = iterables.write(SAMPLES, [INPUT], tmp_path, where="calibration")
    dataset = Dataset(tmp_path, tmp_path / "none", role="calibration", files=files)
    assert dataset.samples == 5
    samples = Samples(dataset.bind([INPUT]))
    assert np.array_equal(samples.rows(3, 5)["x"], np.stack(SAMPLES[3:]))
    fixed = TensorInfo(name="x", shape=(None, 3, 2), dtype="float32")
    with pytest.raises(DatasetError, match="item 2: 'x' has shape 1x2, the model takes 3x2"):
        iterables.write(SAMPLES, [fixed], tmp_path, where="calibration")


@pytest.mark.parametrize(
    ("lengths", "said"),
    [([3, 3, 1, 5], "does not hold the lengths of 5 samples"), ([3, 3, 0, 5, 5], "lengths"), ([3, 3, 1, 5, 7], "6x2")],
)
def test_lengths_that_do_not_fit_are_refused(tmp_path: Path, lengths: list[int], said: str) -> None:
    arrays: dict[str, Any] = {"x": np.zeros((5, 6, 2), np.float32), "x.lengths": lengths}
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(DatasetError, match=said):
        read(tmp_path / "d.npz", tmp_path / "scratch")


def test_samples_that_the_model_does_not_take_are_told(tmp_path: Path) -> None:
    path = folder_of_files(tmp_path / "a")
    with pytest.raises(DatasetError, match="sample 2 of 'x' has shape 1x2, the model takes 3x2"):
        read(path, tmp_path / "s", [TensorInfo(name="x", shape=(None, 3, 2), dtype="float32")])
    np.save(path / "x" / "005.npy", np.zeros((2, 2, 2), np.float32))
    with pytest.raises(DatasetError, match="folder x"):
        read(path, tmp_path / "t")
    (path / "x" / "005.npy").unlink()
    np.save(path / "x" / "004.npy", np.full((2, 2), np.inf, np.float32))
    with pytest.raises(DatasetError, match="first in sample 4"):
        read(path, tmp_path / "u")


def test_what_fills_up_repeats_a_sample(tmp_path: Path) -> None:
    made = free_lengths.filled(np.array([[1, 2, 3]]), (8,), repeated=True)
    assert made.tolist() == [[1, 2, 3, 1, 2, 3, 1, 2]]


def test_golden_vectors_keep_the_length_of_each(tmp_path: Path) -> None:
    samples, _ = read(folder_of_files(tmp_path / "a"), tmp_path / "scratch")
    arrays, own = samples.filled([0, 2, 3])
    expected = {"y": np.zeros((3, 1), np.float32)}
    golden.save(Golden(arrays, expected, {"y": Tolerance(0.0, 0.0)}, own=own), tmp_path / "g.npz")
    loaded = golden.load(tmp_path / "g.npz")
    for one, row in zip(loaded.calls(8), (0, 2, 3), strict=True):
        assert np.array_equal(one["x"][0], SAMPLES[row])
    too_long = {"x": own["x"] + 1}
    golden.save(Golden(arrays, expected, {"y": Tolerance(0.0, 0.0)}, own=too_long), tmp_path / "b.npz")
    with pytest.raises(BundleError):
        golden.load(tmp_path / "b.npz")
