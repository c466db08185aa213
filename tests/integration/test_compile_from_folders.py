"""``kedge compile`` from folders as people have them: raw data in, a bundle out that takes raw data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.support import raw_data
from tests.support.compiling import kedge as command

import kedge
from kedge import Release
from kedge_agent import Model
from kedge_protocol.errors import ConfigError, DatasetError


def compiled(model: Path, data: Path, **options: Any) -> Release:
    return kedge.compile(
        model,
        name="raw",
        version="1",
        targets=["generic-cpu"],
        **{"calibration": data / "train", "evaluation": data / "val", "effort": "quick", "max_drop": 0.2, **options},
        out=model.with_name("OUT"),
    )


def test_pictures_in_class_folders_by_one_command(tmp_path: Path) -> None:
    model = raw_data.colour_model(tmp_path / "colours.onnx", {"names": str(dict(enumerate(raw_data.COLOURS)))})
    for seed, split in enumerate(("train", "val")):
        raw_data.class_folders(tmp_path / "data" / split, seed=seed)
    line = ["compile", str(model), "--name", "colours", "--version", "1", "--target", "generic-cpu"]
    line += ["--calibration", str(tmp_path / "data"), "--evaluation", str(tmp_path / "data")]
    line += ["--task", "classification", "--effort", "quick", "-o", str(tmp_path / "OUT")]
    done = command(line)
    assert done.returncode == 0, done.stderr
    release = Release.open(tmp_path / "OUT")
    report = release.report
    assert report is not None
    assert (report.metric, report.reference.value) == ("top1", 1.0)
    bundle = release.bundles["generic-cpu"]
    assert bundle.config.labels == raw_data.COLOURS
    assert "examples.json" in bundle.files
    model_ = Model(tmp_path / "OUT", target="generic-cpu")
    picture = tmp_path / "data" / "val" / "green" / "0.jpg"
    pixels = np.asarray(Image.open(picture))
    answers = [model_(str(picture)), model_(picture.read_bytes()), model_(Image.open(picture)), model_(pixels)]
    assert all(answer == answers[0] for answer in answers)
    assert answers[0][0].name == "green"
    assert answers[0][0].score > 0.9
    by_hand = model_.raw(np.zeros((1, 3, raw_data.SIZE, raw_data.SIZE), np.uint8))
    assert by_hand.shape == (1, 3)


def test_raw_data_without_a_pipeline_is_refused_with_what_to_give(tmp_path: Path) -> None:
    model = raw_data.colour_model(tmp_path / "colours.onnx")
    for split in ("train", "val"):
        raw_data.class_folders(tmp_path / split, 3)
    with pytest.raises(ConfigError, match=r"holds pictures in class folders, and nothing says.*--task"):
        compiled(model, tmp_path)


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    model = raw_data.colour_model(tmp_path / "colours.onnx")
    for split in ("train", "val"):
        raw_data.class_folders(tmp_path / split, 3)
    (tmp_path / "val" / "red" / "1.png").write_bytes(b"no picture")
    with pytest.raises(DatasetError, match=r"val.*red/1\.png: is no picture"):
        compiled(model, tmp_path, task="classification")
