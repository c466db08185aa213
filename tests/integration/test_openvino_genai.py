"""openvino-genai opens what Kedge writes for OpenVINO, and writes the same tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.integration.test_decoder_graphs import FLOAT, session_of
from tests.support import decoders, genai_pipeline

from kedge.importing.decoders import reading
from kedge.quantization.decoder_scheme import Scheme

pytestmark = pytest.mark.campaign

_PROMPT = [3, 17, 40, 41, 9, 77, 80, 12, 5]
_COUNT = 20


_CASES = [
    *((name, backend) for name in ("llama3", "qwen2", "qwen3", "phi3", "int4", "int8") for backend in ("SDPA", "PA")),
    # Its pages know no windows in this form: those who open such a model ask for SDPA (docs/generation.md).
    ("gemma3", "SDPA"),
    ("mistral", "SDPA"),
]


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("name", "backend"), _CASES)
def test_the_same_greedy_tokens(name: str, backend: str, tmp_path: Path) -> None:
    coded = name.startswith("int")
    # Pages of its attention want heads of at least 32 channels.
    sizes = {} if name == "gemma3" else {"head_dim": 32}
    if name in ("phi3", "qwen2"):
        sizes = {"hidden_size": 128}
    decoder = reading.read(decoders.folder(tmp_path / "model", "llama" if coded else name, changed=sizes))
    scheme = Scheme(precision=name, method="plain") if coded else FLOAT
    folder = tmp_path / "made"
    session = session_of(decoder, folder, scheme, context=64, backend="openvino")
    expected = []
    logits = session.extend(0, _PROMPT)[0]
    for _ in range(_COUNT):
        expected.append(int(logits.argmax()))
        logits = session.step({0: expected[-1]})[0]
    (folder / "config.json").write_text((tmp_path / "model" / "config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    assert genai_pipeline.answer(folder, _PROMPT, _COUNT, backend=backend) == expected
