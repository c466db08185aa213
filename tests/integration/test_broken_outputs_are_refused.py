"""A bundle with an output that is zeroed, shuffled or clipped keeps no budget, on any target."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tests.support import broken_outputs, toolchains
from tests.support.broken_outputs import pictures

import kedge
from kedge_protocol.errors import BudgetError

TARGETS = ["generic-cpu", "intel-cpu", "rpi4"]
BREAKS: dict[str, tuple[str, str]] = {
    "scores_zeroed": ("scores", "how=zero"),
    "scores_shuffled": ("scores", "how=shuffle"),
    "scores_clipped": ("scores", "how=clip"),
    "values_zeroed": ("values", "how=zero"),
    "values_shuffled": ("values", "how=shuffle"),
    "values_clipped": ("values", "how=clip"),
    "one_channel_zeroed": ("values", "how=zero,start=3,stop=4"),
    "one_channel_clipped": ("values", "how=clip,start=3,stop=4"),
    "two_channels_exchanged": ("values", "how=shuffle,start=3,stop=5"),
    "beside_boxes_zeroed": ("detections", "how=zero,start=4"),
    "beside_boxes_shuffled": ("detections", "how=shuffle,start=4"),
    "beside_boxes_clipped": ("detections", "how=clip,start=4"),
    "beside_scores_zeroed": ("detections", "how=zero,stop=4"),
    "one_class_beside_boxes_zeroed": ("detections", "how=zero,start=6,stop=7"),
}
"""Output → what it is, and how it is broken."""
WHOLE = {"scores_whole": "scores", "values_whole": "values", "detections_whole": "detections"}


@pytest.fixture
def breaking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of data, with the step where every process finds it."""
    folder = tmp_path / "step"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(broken_outputs.installed(folder)))
    monkeypatch.setenv("PYTHONPATH", ":".join([str(folder), *(one for one in sys.path if one)]))
    np.savez(tmp_path / "calibration.npz", x=pictures(48, 1))
    np.savez(tmp_path / "evaluation.npz", x=pictures(96, 2))
    return tmp_path


def refused(folder: Path, target: str, broken: list[str], whole: dict[str, str]) -> tuple[str, dict[str, Any]]:
    """The error's text, and the report's outputs by name."""
    if target == "rpi4":
        toolchains.required("tflite")
    outputs = {name: BREAKS[name][0] for name in broken} | whole
    onnx.save(broken_outputs.network(outputs), folder / "model.onnx")
    with pytest.raises(BudgetError) as error:
        kedge.compile(
            folder / "model.onnx",
            name="broken",
            version="1",
            targets=[target],
            calibration=folder / "calibration.npz",
            evaluation=folder / "evaluation.npz",
            out=folder / "OUT",
            max_drop=1.0,
            step=[f"break:output={name},{BREAKS[name][1]}" for name in broken],
            quantize="precision=int8",
        )
    (bundle,) = json.loads((folder / "OUT.nearest" / "report.json").read_text())["bundles"]
    return str(error.value), {one["name"]: one for one in bundle["outputs"]}


@pytest.mark.parametrize("target", TARGETS)
def test_each_broken_output_is_lost_and_the_whole_ones_are_not(breaking: Path, target: str) -> None:
    said, outputs = refused(breaking, target, list(BREAKS), WHOLE)
    for name in BREAKS:
        assert outputs[name]["lost"], name
        assert f"output '{name}' is lost" in said
    for name in WHOLE:
        assert not outputs[name]["lost"], outputs[name]
        assert outputs[name]["sqnr_db"] > 25
        assert min((part["sqnr_db"] for part in outputs[name]["parts"]), default=25) > 20, outputs[name]


@pytest.mark.campaign
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", BREAKS)
def test_one_broken_output_is_enough(breaking: Path, name: str, target: str) -> None:
    said, outputs = refused(breaking, target, [name], WHOLE)
    assert f"output '{name}' is lost" in said
    assert not any(outputs[one]["lost"] for one in WHOLE)
