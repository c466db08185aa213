"""A checkpoint of Ultralytics' YOLO and its ``data.yaml``, in one command. Marked ``zoo``: the toolchain is large."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from tests.integration.test_zoo_today import folders
from tests.support import shapes, toolchains, zoo
from tests.support.compiling import kedge

import kedge_agent
from kedge_protocol.bundle.layout import Layout

pytestmark = [pytest.mark.zoo, pytest.mark.timeout(3600)]

_MAKER = """
import sys
from ultralytics import YOLO
model = YOLO("yolov8n.yaml")
model.ckpt = {"train_args": {"imgsz": int(sys.argv[2]), "task": "detect"}}
model.model.names = {index: name for index, name in enumerate(sys.argv[3:])}
model.save(sys.argv[1])
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A YOLOv8n with fresh weights, saved by Ultralytics itself."""
    folder = tmp_path_factory.mktemp("checkpoint")
    python = toolchains.required("ultralytics").python
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "YOLO_CONFIG_DIR": str(folder)}
    subprocess.run(
        [str(python), "-c", _MAKER, str(folder / "best.pt"), str(shapes.SIZE), *shapes.KINDS],
        check=True,
        env=environment,
        timeout=600,
    )
    return folder / "best.pt"


def test_a_checkpoint_and_a_data_yaml_are_enough(checkpoint: Path, tmp_path: Path) -> None:
    data = folders(tmp_path / "data", {"train": (32, 41), "val": (32, 42)})
    done = kedge(
        [
            "compile", str(checkpoint), "--trust-pickle", "--name", "best", "--version", "1", "--target", "generic-cpu",
            "--calibration", str(data), "--evaluation", str(data), "--metric", "sqnr", "--max-drop", "180",
            "--effort", "quick", "-o", str(tmp_path / "OUT"),
        ]
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "OUT" / "report.json").read_text())
    assert report["tools"]["ultralytics"]
    assert any(f"pictures of {shapes.SIZE}" in note for note in report["notes"])
    config = Layout(tmp_path / "OUT").bundle("generic-cpu").config
    assert config.pipeline is not None
    assert list(config.labels) == list(shapes.KINDS)
    assert config.inputs[0].shape[1:] == (3, shapes.SIZE, shapes.SIZE)
    pixels, _ = shapes.pictures(8, seed=43)
    model = kedge_agent.Model(tmp_path / "OUT", target="generic-cpu")
    for one in pixels:
        model(Image.fromarray(one.transpose(1, 2, 0)))
    zoo.keep(
        {"model": "Ultralytics checkpoint", "target": "generic-cpu", "precision": report["bundles"][0]["precision"]}
    )


def test_without_leave_to_unpickle_it_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    done = kedge(["compile", str(checkpoint), "--name", "a", "--version", "1", "--target", "generic-cpu",
                  "--calibration", "c.npz", "--evaluation", "e.npz", "-o", str(tmp_path / "OUT")])  # fmt: skip
    assert done.returncode != 0
    assert "kedge toolchain install ultralytics" in " ".join(done.stderr.split())
