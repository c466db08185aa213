"""MiniLM's six layers distilled into three: closer to the whole than the same three layers without a teacher."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import minilm, requirements

import kedge
from kedge_agent import Model

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(3600)]

_LENGTH = 24
_LAYERS = (1, 3, 5)


def arrays(sentences: Sequence[str], path: Path) -> Path:
    feed: dict[str, Any] = minilm.feed(list(sentences), _LENGTH)
    np.savez(path, **feed)
    return path


def neighbours(vectors: np.ndarray) -> np.ndarray:
    """For each sentence the one that is most like it."""
    likeness = vectors @ vectors.T
    np.fill_diagonal(likeness, -2)
    found: np.ndarray = likeness.argmax(axis=1)
    return found


def test_three_layers_learn_from_six(tmp_path: Path) -> None:
    for name in minilm.NEEDED:
        requirements.package(name)
    whole, cut = tmp_path / "whole.onnx", tmp_path / "cut.onnx"
    minilm.export(whole)
    minilm.export(cut, _LAYERS)
    steps = os.environ.get("KEDGE_DISTIL_STEPS", "800")
    kedge.compile(
        cut,
        name="meaning",
        version="1.0",
        targets=["generic-cpu"],
        calibration=arrays(minilm.calibration(3000), tmp_path / "calibration.npz"),
        evaluation=arrays(minilm.held_out(240), tmp_path / "evaluation.npz"),
        step=(f"distil:teacher={whole},steps={steps},attention_weight=0.1,learning_rate=0.0003",),
        quantize="precision=float32",
        max_drop=0.1,
        out=tmp_path / "OUT",
    )
    fresh = minilm.held_out(1240)[240:]
    feed = minilm.feed(fresh, _LENGTH)
    vectors = {}
    for name, source in (("whole", whole), ("cut", cut)):
        import onnxruntime

        session = onnxruntime.InferenceSession(str(source), providers=["CPUExecutionProvider"])
        (vectors[name],) = session.run(None, feed)
    vectors["distilled"] = np.asarray(Model(tmp_path / "OUT", target="generic-cpu").raw(feed))
    likeness = {name: float(minilm.cosines(vectors["whole"], one).mean()) for name, one in vectors.items()}
    agree = {name: float((neighbours(one) == neighbours(vectors["whole"])).mean()) for name, one in vectors.items()}
    report = json.loads((tmp_path / "OUT" / "report.json").read_text())
    print(json.dumps({"cosine": likeness, "same neighbour": agree, "size": report["bundles"][0]["size_ratio"]}))
    assert likeness["distilled"] > likeness["cut"] + 0.1
    assert agree["distilled"] > agree["cut"] + 0.1
