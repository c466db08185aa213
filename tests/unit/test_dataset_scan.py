"""Reading a data set once: NaNs and shared samples, in pieces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kedge.evaluation import dataset as reading
from kedge.evaluation.dataset import Dataset
from kedge_protocol.errors import DatasetError


def of(folder: Path, **arrays: np.ndarray) -> Dataset:
    folder.mkdir(exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return Dataset(folder, folder, role="calibration")


@pytest.mark.parametrize("bad", [np.inf, -np.inf])
def test_the_first_sample_that_is_not_finite_is_named(
    tmp_path: Path, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "CHUNK_BYTES", 64)  # several pieces
    array = np.zeros((50, 5), np.float32)
    array[37, 2] = bad
    array[41] = bad
    with pytest.raises(DatasetError, match="'input' holds NaN or infinite values, first in sample 37"):
        of(tmp_path, input=array).scan()


def test_what_is_missing_is_for_the_model_to_take(tmp_path: Path) -> None:
    array = np.zeros((50, 5), np.float32)
    array[[37, 41], 2] = np.nan
    dataset = of(tmp_path, input=array)
    scan = dataset.scan()
    assert scan.missing == {"input": 37}
    dataset.check_missing(scan, taken=True)
    with pytest.raises(DatasetError, match=r"'input' has no value \(NaN\) in sample 37.*an imputer"):
        dataset.check_missing(scan, taken=False)
    with pytest.raises(DatasetError, match="'label' holds NaN"):
        of(tmp_path / "labels", input=np.zeros((3, 2)), label=np.array([0.0, np.nan, 1.0])).scan()


@given(shared=st.sets(st.integers(0, 19)), size=st.sampled_from([8, 64, 1 << 20]))
def test_shared_samples_are_counted_whatever_the_pieces(
    shared: set[int], size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng = np.random.default_rng(1)
    one, two = rng.normal(size=(20, 3)), rng.normal(size=(20, 3))
    for index in shared:
        two[19 - index] = one[index]
    folder = tmp_path_factory.mktemp("sets")
    before, reading.CHUNK_BYTES = reading.CHUNK_BYTES, size
    try:
        counted = of(folder / "a", input=one).scan().shared_with(of(folder / "b", input=two).scan())
    finally:
        reading.CHUNK_BYTES = before
    assert counted == len(shared)


def test_a_sample_is_shared_only_if_all_its_inputs_are(tmp_path: Path) -> None:
    same, left, right = np.ones((4, 2)), np.zeros((4, 2)), np.full((4, 2), 5.0)
    first = of(tmp_path / "a", x=same, y=left).scan()
    assert first.shared_with(of(tmp_path / "b", x=same, y=right).scan()) == 0
    assert first.shared_with(of(tmp_path / "c", x=same, y=left).scan()) == 4


def test_labels_do_not_make_a_sample_another(tmp_path: Path) -> None:
    array = np.arange(8.0).reshape(4, 2)
    first = of(tmp_path / "a", input=array).scan()
    assert first.shared_with(of(tmp_path / "b", input=array, label=np.arange(4)).scan()) == 4
