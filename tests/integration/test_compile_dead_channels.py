"""Dead channels go by themselves at the beginning of a compilation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper
from tests.support.dead_channels import network

import kedge
from kedge_agent import Model
from kedge_targets.graph.rounding import sqnr_db


def test_half_of_the_channels_dead_is_half_of_the_bytes_and_the_same_answers(tmp_path: Path) -> None:
    model = network(dead=list(range(0, 64, 2)), bias=-0.3, padded=False, channels=64)
    onnx.save(model, tmp_path / "model.onnx")
    pictures = np.random.default_rng(1).normal(size=(24, 3, 12, 12)).astype(np.float32)
    np.savez(tmp_path / "c.npz", x=pictures[:8])
    np.savez(tmp_path / "e.npz", x=pictures[8:16])
    release = kedge.compile(
        tmp_path / "model.onnx",
        name="half",
        version="1",
        targets=["generic-cpu"],
        calibration=tmp_path / "c.npz",
        evaluation=tmp_path / "e.npz",
        out=tmp_path / "OUT",
        quantize="precision=float32",
    )
    assert release.report is not None
    assert any("32 dead channels were dropped (first 64 → 32)" in note for note in release.report.notes)
    assert release.bundles["generic-cpu"].model_bytes <= 0.6 * (tmp_path / "model.onnx").stat().st_size
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    wanted = session.run(None, {"x": pictures[16:]})[0]
    got = Model(release.path, target="generic-cpu")(pictures[16:])
    assert np.abs(wanted - got).max() <= 1e-6 * max(1.0, np.abs(wanted).max())


@pytest.mark.parametrize(
    "target", ["generic-cpu", *(pytest.param(one, marks=pytest.mark.campaign) for one in ("intel-cpu", "rpi4"))]
)
def test_rows_that_training_switched_off_do_not_make_equalization_explode(target: str, tmp_path: Path) -> None:
    model = network(dead=[], bias=0.05, padded=False, channels=32)
    for tensor in model.graph.initializer:
        value = numpy_helper.to_array(tensor).copy()
        if value.ndim == 4 and value.shape[1] == 3:
            value[::2] *= np.float32(1e-30)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    onnx.save(model, tmp_path / "model.onnx")
    pictures = np.random.default_rng(1).normal(size=(96, 3, 12, 12)).astype(np.float32)
    np.savez(tmp_path / "c.npz", x=pictures[:48])
    np.savez(tmp_path / "e.npz", x=pictures[48:80])
    release = kedge.compile(
        tmp_path / "model.onnx",
        name="faint",
        version="1",
        targets=[target],
        calibration=tmp_path / "c.npz",
        evaluation=tmp_path / "e.npz",
        out=tmp_path / "OUT",
        step=["equalize"],
        quantize="precision=int8",
        max_drop=1.0,
    )
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    wanted = session.run(None, {"x": pictures[80:]})[0]
    assert sqnr_db(wanted, Model(release.path, target=target)(pictures[80:])) > 20
