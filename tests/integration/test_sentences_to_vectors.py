"""MiniLM with its own tokenizer: lines of text compile it, sentences become vectors on the device."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from tests.support import minilm

import kedge
from kedge_agent import Model

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(1800)]

LINES = [f"The {thing} {verb} in the {place}." for thing in ("cat", "engine", "river") for verb in ("sleeps", "stops")
         for place in ("garden", "city", "night", "long winter of the north")]  # fmt: skip


@pytest.mark.skipif(minilm.missing() is not None, reason=f"{minilm.missing()} is not installed")
def test_a_sentence_becomes_the_vector_that_the_tokenizer_and_the_float_model_give(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    model = tmp_path / "minilm.onnx"
    minilm.export(model)
    shutil.copyfile(minilm.folder() / "tokenizer.json", tmp_path / "tokenizer.json")
    (tmp_path / "lines.txt").write_text("\n".join(LINES), encoding="utf-8")
    kedge.compile(
        model, name="minilm", version="1", targets=["generic-cpu"], calibration=tmp_path / "lines.txt",
        evaluation=tmp_path / "lines.txt", task="embedding", quantize="precision=float32", out=tmp_path / "OUT",
    )  # fmt: skip
    encoder = Model(tmp_path / "OUT", target="generic-cpu")
    sentence = "A dog runs through the park."
    tokens = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(sentence)
    ids = np.asarray([tokens.ids])[:, : sum(tokens.attention_mask)]
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    found = encoder(sentence)
    np.testing.assert_allclose(found.values, expected[0], atol=1e-4)
    near, far = encoder(["A puppy is running in a park.", "The interest rate was raised."])
    assert found.similarity(near) > 0.6 > found.similarity(far)
