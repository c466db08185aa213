"""Random tiny models of transformers' own, saved by it and read by Kedge: logits in prefill and decode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.integration.test_decoder_graphs import _session
from tests.support import decoders

from kedge.importing.decoders import reading

transformers = pytest.importorskip("transformers", reason="pip install transformers, to compare decoders with it")
pytestmark = pytest.mark.campaign

_BASE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}
_GEMMA = {"head_dim": 32, "sliding_window": 6, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_BASE, "tie_word_embeddings": False}),
    "llama3": ("LlamaConfig", {**_BASE, "tie_word_embeddings": True, "rope_parameters": _LLAMA3}),
    "mistral": ("MistralConfig", {**_BASE, "sliding_window": 6}),
    "qwen2": ("Qwen2Config", _BASE),
    "qwen3": ("Qwen3Config", {**_BASE, "head_dim": 24}),
    "gemma3": ("Gemma3TextConfig", {**_BASE, **_GEMMA, "query_pre_attn_scalar": 32}),
    "phi3": ("Phi3Config", {**_BASE, "pad_token_id": 0, "partial_rotary_factor": 0.75}),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 96, "n_positions": 64}),
}


@pytest.mark.parametrize("name", list(_MODELS))
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    import torch

    kind, options = _MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**options)).float().eval()
    with torch.no_grad():
        for title, parameter in model.named_parameters():
            if any(part in title for part in ("norm", "bias", "ln_")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "model")
    decoders.tokenizer(tmp_path / "model")
    tokens = np.random.default_rng(1).integers(3, 96, 18).tolist()
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    session = _session(reading.read(tmp_path / "model"), tmp_path / "made")
    found = [session.extend(0, tokens[:9], keep=9), session.extend(0, tokens[9:12], keep=3)]
    found += [session.step({0: token})[0][None] for token in tokens[12:]]
    assert np.abs(np.concatenate(found) - expected).max() / expected.std() < 1e-5
