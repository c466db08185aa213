"""A language model on ONNX Runtime's CUDA provider, where there is one: it computes what a float64 decoder computes,
and a beginning is taken over by another slot.

The figures that it finds are printed and recorded as properties of the test (``pytest --junit-xml``).
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from tests.integration.test_decoder_graphs import session_of
from tests.support import decoders

from kedge.importing.decoders import reading
from kedge.quantization.decoder_scheme import Scheme
from kedge_targets.backends.tensorrt import fallback
from kedge_targets.decoder.session import DecoderSession

_TOKENS = [3, 17, 40, 41, 9, 77, 80, 12, 5, 66, 31, 30, 29, 8]
_WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", [Scheme(precision="float16", embedding="float16"), Scheme(method="plain")])
def test_a_decoder_runs_on_cuda(scheme: Scheme, tmp_path: Path, record_property: pytest.FixtureRequest) -> None:
    if not fallback.has_cuda():
        pytest.skip("this ONNX Runtime was not built for CUDA")
    decoder = reading.read(decoders.folder(tmp_path / "model", "llama", changed=_WIDE))
    session: DecoderSession = session_of(decoder, tmp_path / "made", scheme, slots=2, backend="tensorrt")
    assert session.detail.endswith("on CUDA")
    expected = decoders.PlainDecoder(decoder.spec, decoder.weights).logits(_TOKENS)
    parts = [session.extend(1, _TOKENS[:10], keep=10)]
    session.copy(1, 0, 10)
    parts += [session.step({0: token, 1: token})[0][None] for token in _TOKENS[10:]]
    apart = np.abs(np.concatenate(parts) - expected).max() / expected.std()
    assert apart < (0.02 if scheme.precision == "float16" else 1.0)
    began = time.perf_counter()
    for token in _TOKENS:
        session.step({1: token})
    figures = {"apart": round(float(apart), 5), "step_ms": round((time.perf_counter() - began) / len(_TOKENS) * 1e3, 3)}
    for name, value in figures.items():
        record_property(name, value)  # type: ignore[operator]  # pytest gives a function
        print(f"{name}: {value}")
    session.close()
