"""The coarse kernel set: each half-precision weight moved by one step, always the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from tests.support import nvidia

from kedge_targets.backends.tensorrt import half_precision
from kedge_targets.backends.tensorrt.runtime import Runtime


def test_each_weight_moves_by_one_step(tmp_path: Path) -> None:
    raw = nvidia.graphs(batch=1)["fp16"]
    (tmp_path / "model_fp16.onnx").write_bytes(raw)
    moved = half_precision.of(tmp_path / "model_fp16.onnx")
    assert moved == half_precision.of(tmp_path / "model_fp16.onnx")
    before, after = (onnx.load_model_from_string(one).graph.initializer for one in (raw, moved))
    for old, new in zip(before, after, strict=True):
        values, others = numpy_helper.to_array(old), numpy_helper.to_array(new)
        steps = others.view(np.int16).astype(int) - values.view(np.int16).astype(int)
        assert set(np.abs(steps[values != 0])) == {1}
        assert not others[values == 0].any()


def test_answers_are_near_and_not_the_same(tmp_path: Path) -> None:
    folder, _ = nvidia.unpacked(nvidia.release(tmp_path / "made"), tmp_path / "slot")
    answers = {}
    for name in Runtime().kernel_sets:
        session = Runtime().load(folder / "recipe.json", {}, kernel_set=name)
        answers[name] = session.run([nvidia.samples(1)])[0]
        session.close()
    difference = np.abs(answers["coarse"] - answers["fp16"]).max()
    assert 0 < difference < 0.01
    assert difference < np.abs(answers["int8"] - answers["fp16"]).max()
