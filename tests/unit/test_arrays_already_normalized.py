"""Arrays of a picture pipeline's model that hold the model's own tensors are not normalized again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kedge.compiler import normalized_arrays
from kedge.evaluation.dataset import Data
from kedge_protocol.bundle.config import Preprocess
from kedge_targets.graph.signature import TensorInfo
from kedge_targets.pipeline import normalization

SPEC = TensorInfo(name="images", shape=(None, 3, 8, 8), dtype="float32", layout="NCHW")
SHARES = Preprocess(scale=(1 / 255,))
IMAGENET = Preprocess(scale=(1 / 255,), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 3, 8, 8)).astype(np.uint8)


def turned(folder: Path, array: np.ndarray, how: Preprocess) -> tuple[np.ndarray, tuple[str, ...]]:
    np.save(folder / "images.npy", array)
    data = Data(arrays={"images": str(folder / "images.npy")}, samples=len(array))
    made, notes = normalized_arrays.turned_back(data, (SPEC,), {"images": how}, role="calibration", scratch=folder)
    return np.load(made.arrays["images"]), notes


@pytest.mark.parametrize("how", [SHARES, IMAGENET])
def test_what_is_normalized_becomes_the_pixels_it_was(tmp_path: Path, how: Preprocess) -> None:
    ready = normalization.apply(PIXELS, how, layout="NCHW")
    raw, notes = turned(tmp_path, ready, how)
    assert np.array_equal(raw, PIXELS)
    assert "the pipeline's normalization is undone" in notes[0]


@pytest.mark.parametrize("array", [PIXELS, PIXELS.astype(np.float32), PIXELS.astype(np.float32) / 2])
@pytest.mark.parametrize("how", [SHARES, IMAGENET])
def test_pixels_stay(tmp_path: Path, array: np.ndarray, how: Preprocess) -> None:
    raw, notes = turned(tmp_path, array, how)
    assert np.array_equal(raw, array)
    assert not notes


def test_where_both_ranges_are_alike_nothing_is_guessed(tmp_path: Path) -> None:
    how = Preprocess(mean=(128.0,))
    ready = PIXELS.astype(np.float32) - 128
    raw, notes = turned(tmp_path, ready, how)
    assert np.array_equal(raw, ready)
    assert not notes
