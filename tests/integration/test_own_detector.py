"""A detector of our own training, YOLO-like: int8 keeps its mean average precision on three targets, counted by
pycocotools on a decoding that is not Kedge's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
from tests.support import detections, own_detector, shapes, zoo
from tests.support.detections import Found, Precisions

import kedge
import kedge_agent

Array = npt.NDArray[Any]

TARGETS = ("generic-cpu", "intel-cpu", "rpi4")
_AT_ONCE = 16

pytestmark = [pytest.mark.zoo, pytest.mark.timeout(7200)]


_SEED = 14
_ALLOWED = 0.003
"""Of the mean average precision on 300 pictures, to be within 0.005 on others."""


def labelled(count: int) -> tuple[Array, Array]:
    """Pictures, and their objects as ``map`` takes them: class, corners as shares of the picture, no crowd."""
    pixels, truth = shapes.pictures(count, seed=_SEED)
    labels = np.full((count, max(len(one.boxes) for one in truth), 6), -1, np.float32)
    for row, one in zip(labels, truth, strict=True):
        many = len(one.boxes)
        row[:many, 0], row[:many, 1:5], row[:many, 5] = one.classes, one.boxes / shapes.SIZE, 0
    return pixels.astype(np.float32) / 255, labels


@pytest.fixture(scope="module")
def judged() -> tuple[Array, list[Found]]:
    return own_detector.judged()


@pytest.fixture(scope="module")
def reference(judged: tuple[Array, list[Found]]) -> Precisions:
    pictures, truth = judged
    session = onnxruntime.InferenceSession(str(own_detector.trained()), providers=["CPUExecutionProvider"])
    starts = range(0, len(pictures), _AT_ONCE)
    outputs = [session.run(None, {"images": pictures[start : start + _AT_ONCE]})[0] for start in starts]
    return own_detector.precisions(np.concatenate(outputs), truth)


def test_the_float_model_is_neither_hopeless_nor_perfect(
    judged: tuple[Array, list[Found]], reference: Precisions
) -> None:
    pictures, truth = judged
    assert len(pictures) >= 500
    assert sum(len(one.boxes) for one in truth) >= 2000
    assert 0.45 <= reference.mean() <= 0.85


@pytest.mark.parametrize("target", TARGETS)
def test_int8_keeps_the_mean_average_precision(
    target: str, judged: tuple[Array, list[Found]], reference: Precisions, tmp_path: Path
) -> None:
    pictures, truth = judged
    seen, known = labelled(396)
    np.savez(tmp_path / "calibration.npz", images=seen[:96])
    np.savez(tmp_path / "evaluation.npz", images=seen[96:], label=known[96:])
    out = tmp_path / "OUT"
    kedge.compile(
        own_detector.trained(),
        name="own",
        version="1",
        targets=[target],
        calibration=tmp_path / "calibration.npz",
        evaluation=tmp_path / "evaluation.npz",
        out=out,
        metric="map",
        max_drop=_ALLOWED,
    )
    model = kedge_agent.Model(out, target=target)
    outputs = np.concatenate([np.asarray(model.raw(picture[None])).reshape(1, 4 + own_detector.CLASSES, -1)
                              for picture in pictures])  # fmt: skip
    loss, low, high = detections.paired_interval(reference, own_detector.precisions(outputs, truth))
    line = json.loads((out / "report.json").read_text())["bundles"][0]
    zoo.keep(
        {
            "model": "own detector, mAP 50-95",
            "target": target,
            "label": line["label"],
            "float": reference.mean(),
            "loss": loss,
            "interval": [low, high],
            "size": line["size_ratio"],
        }
    )
    assert line["precision"] in ("int8", "mixed")
    assert loss <= 0.005
