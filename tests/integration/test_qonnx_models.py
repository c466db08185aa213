"""FINN's published networks, read as QONNX and run by ONNX Runtime: the published accuracy, to the last image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kedge_targets.graph import library, model_reader, qonnx, signature


@pytest.mark.shared_data
@pytest.mark.parametrize(("name", "correct"), [("tfc_1w1a", 9296), ("tfc_1w2a", 9474)])
def test_published_accuracy_exactly(shared_data: Path, name: str, correct: int) -> None:
    model = model_reader.read(shared_data / "models" / f"{name}_qonnx.onnx")
    assert qonnx.is_quantized(model)
    assert [output.shape for output in signature.outputs(model)] == [(1, 10)]
    settings = library.load().SessionOptions()
    settings.log_severity_level = 4
    session = library.opened(qonnx.expand_qonnx(model).SerializeToString(), settings, where=name)
    with np.load(shared_data / "eval" / "mnist_t10k_uint8.npz") as arrays:
        images, labels = arrays["input"], arrays["label"]
    given = session.get_inputs()[0].name
    scores = [
        session.run(None, {given: image[None].astype(np.float32) / np.float32(255)})[0].argmax() for image in images
    ]
    assert int((np.array(scores) == labels).sum()) == correct
