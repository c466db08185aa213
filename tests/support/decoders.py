"""Random tiny decoders in Hugging Face's form, and a decoder written out in float64 to compare with."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_targets.decoder.spec import DecoderSpec

Array = npt.NDArray[Any]

VOCABULARY = 96
_BASE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "llama": {**_BASE, "model_type": "llama", "tie_word_embeddings": False},
    "llama3": {**_BASE, "model_type": "llama", "tie_word_embeddings": True, "rope_parameters": _LLAMA3},
    "mistral": {**_BASE, "model_type": "mistral", "sliding_window": 6, "tie_word_embeddings": False},
    "qwen2": {**_BASE, "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {**_BASE, "model_type": "qwen3", "head_dim": 24, "tie_word_embeddings": True},
    "gemma3": {
        **_BASE,
        "model_type": "gemma3_text",
        "head_dim": 16,
        "query_pre_attn_scalar": 32,
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "rope_local_base_freq": 100.0,
        "rope_theta": 10000.0,
    },
    "phi3": {**_BASE, "model_type": "phi3", "partial_rotary_factor": 0.75, "tie_word_embeddings": False},
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "vocab_size": VOCABULARY,
        "n_positions": 64,
        "eos_token_id": 2,
        "bos_token_id": 1,
    },
}


def folder(
    path: Path,
    name: str,
    *,
    dtype: str = "F32",
    shards: int = 1,
    template: str | None = None,
    changed: Mapping[str, Any] | None = None,
    stored: Callable[[Array], Array] = np.asarray,
) -> Path:
    """Write a random model of a known configuration.

    Args:
        changed: keys of the configuration with other values; with ``eos_token_id`` None no token ends an answer.
        stored: the matrices of the layers as another format stores them.
    """
    from kedge.importing.decoders import config, names

    path.mkdir(parents=True, exist_ok=True)
    raw = {**CONFIGURATIONS[name], **(changed or {})}
    spec = config.spec_of(raw, where=name)
    random = np.random.default_rng(7)
    expected = names.expected_shapes(spec)
    if spec.architecture == "qwen2":
        sizes = {"q": spec.heads * spec.head_size, "k": spec.kv_heads * spec.head_size}
        sizes["v"] = sizes["k"]
        for layer in range(len(spec.layers)):
            for part, size in sizes.items():
                expected[f"model.layers.{layer}.self_attn.{part}_proj.bias"] = (size,)
    tensors = {name: random.normal(0, 0.25, shape).astype(np.float32) for name, shape in expected.items()}
    tensors = {key: stored(one) if one.ndim == 2 and ".layers." in key else one for key, one in tensors.items()}
    (path / "config.json").write_text(json.dumps(raw))
    write_shards(path, tensors, dtype=dtype, shards=shards)
    tokenizer(path, template=template, vocabulary=raw["vocab_size"], ends=raw.get("eos_token_id", 2) is not None)
    return path


def writer(
    place: Path,
    *,
    version: str = "1.0",
    slots: int,
    context: int | None = None,
    template: str | None = None,
    changed: Mapping[str, Any] | None = None,
    stored: Callable[[Array], Array] = np.asarray,
) -> Path:
    """Compile a random float32 Llama of all printable letters, named ``writer``, for generic-cpu; return the release.

    Args:
        place: gets the model, its texts and the release, by version.
        slots, context: options of the compilation.
        template, changed, stored: see :func:`folder`; it has 512 positions unless ``changed`` says otherwise.
    """
    import kedge

    sizes = {"max_position_embeddings": 512, "vocab_size": 100, **(changed or {})}
    folder(place / version, "llama", template=template, changed=sizes, stored=stored)
    random = np.random.default_rng(3)
    for name in ("calibration", "evaluation"):
        (place / f"{name}.txt").write_text("".join(chr(40 + at) for at in random.integers(0, 50, 2500)))
    return kedge.compile(
        place / version,
        name="writer",
        version=version,
        targets=["generic-cpu"],
        calibration=place / "calibration.txt",
        evaluation=place / "evaluation.txt",
        out=place / f"out-{version}",
        quantize="precision=float32",
        slots=slots,
        context=context,
    ).path


def write_shards(path: Path, tensors: Mapping[str, Array], *, dtype: str = "F32", shards: int = 1) -> None:
    """Write tensors as safetensors, in one file or several with their index."""
    named = sorted(tensors)
    if shards == 1:
        write_tensors(path / "model.safetensors", tensors, dtype=dtype)
        return
    index = {}
    for at in range(shards):
        title = f"model-{at + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in named[at::shards]}
        write_tensors(path / title, part, dtype=dtype)
        index |= dict.fromkeys(part, title)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def write_tensors(path: Path, tensors: Mapping[str, Array], *, dtype: str = "F32") -> None:
    """Write one safetensors file."""
    header, offset, blobs = {}, 0, []
    for name, array in tensors.items():
        if dtype == "BF16":
            raw = (np.ascontiguousarray(array, np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
        else:
            raw = np.ascontiguousarray(array, {"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [offset, offset + len(raw)]}
        offset += len(raw)
        blobs.append(raw)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def tokenizer(path: Path, *, template: str | None = None, vocabulary: int = VOCABULARY, ends: bool = True) -> None:
    """A tokenizer of single letters, with a chat template or without; ``ends``: it names the token that ends a text."""
    letters = ["<unk>", "<s>", "</s>", *(chr(32 + at) for at in range(vocabulary - 4))]
    model = {
        "type": "BPE",
        "vocab": {token: at for at, token in enumerate(letters)},
        "merges": [],
        "unk_token": "<unk>",
    }
    special = [
        {
            "id": at,
            "content": letters[at],
            "special": True,
            "normalized": False,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
        }
        for at in range(3)
    ]
    # As SentencePiece's tokenizers are written; without a decoder, texts have a space after each letter.
    decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
    whole = {"version": "1.0", "added_tokens": special, "model": model, "decoder": decoder}
    (path / "tokenizer.json").write_text(json.dumps(whole))
    settings: dict[str, Any] = {"bos_token": "<s>", "add_bos_token": True}
    if ends:
        settings["eos_token"] = "</s>"
    if template is not None:
        settings["chat_template"] = template
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


class PlainDecoder:
    """A decoder in float64, the whole sequence at once, written from the papers and not from Kedge's graph."""

    def __init__(self, spec: DecoderSpec, weights: Any) -> None:
        self._spec = spec
        self._weights = weights

    def logits(self, tokens: list[int]) -> Array:
        """Float64 [positions, vocabulary]."""
        spec, w = self._spec, self._weights
        table = w.outer("embedding").astype(np.float64)
        x = table[tokens] * spec.embedding_scale
        if spec.learned_positions:
            x = x + w.outer("positions")[: len(tokens)]
        for index, kind in enumerate(spec.layers):
            t = {name: value.astype(np.float64) for name, value in w.layer(index).items()}
            out = self._attention(self._norm(x, t, "attention_norm"), t, kind)
            x = x + (self._norm(out, t, "attention_post_norm") if spec.post_norms else out)
            out = self._inner(self._norm(x, t, "feed_forward_norm"), t)
            x = x + (self._norm(out, t, "feed_forward_post_norm") if spec.post_norms else out)
        ends = {"norm": w.outer("norm").astype(np.float64)}
        if spec.norm == "layer":
            ends["norm.bias"] = w.outer("norm.bias").astype(np.float64)
        head = table if spec.tied else w.outer("head").astype(np.float64)
        found: Array = self._norm(x, ends, "norm") @ head.T
        return found

    def _norm(self, x: Array, t: Mapping[str, Array], name: str) -> Array:
        if self._spec.norm == "layer":
            y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + self._spec.norm_epsilon)
            return np.asarray(y * t[name] + t[f"{name}.bias"])
        y = x / np.sqrt((x * x).mean(-1, keepdims=True) + self._spec.norm_epsilon)
        return np.asarray(y * (t[name] + self._spec.norm_offset))

    def _heads(self, x: Array, t: Mapping[str, Array], name: str, heads: int) -> Array:
        y = x @ t[name].T + t.get(f"{name}.bias", 0.0)
        y = y.reshape(len(x), heads, self._spec.head_size)
        if f"{name}_norm" in t:
            y = self._norm(y, t, f"{name}_norm")
        return np.asarray(y.transpose(1, 0, 2))

    def _attention(self, x: Array, t: Mapping[str, Array], kind: Any) -> Array:
        spec, length = self._spec, len(x)
        q, k = self._heads(x, t, "q", spec.heads), self._heads(x, t, "k", spec.kv_heads)
        v = self._heads(x, t, "v", spec.kv_heads)
        if kind.rotary is not None:
            q, k = (self._turned(one, kind.rotary.frequencies(spec.head_size)) for one in (q, k))
        each = spec.heads // spec.kv_heads
        k, v = np.repeat(k, each, axis=0), np.repeat(v, each, axis=0)
        scores = q @ k.transpose(0, 2, 1) * spec.attention_scale
        back = np.arange(length)[:, None] - np.arange(length)[None]
        seen = (back >= 0) & (back < (kind.window or length))
        scores = np.where(seen, scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        joined = (shares @ v).transpose(1, 0, 2).reshape(length, -1)
        return np.asarray(joined @ t["o"].T + t.get("o.bias", 0.0))

    @staticmethod
    def _turned(x: Array, frequencies: Array) -> Array:
        angles = np.outer(np.arange(x.shape[1]), frequencies)
        half = len(frequencies)
        pairs = x[..., :half] + 1j * x[..., half : 2 * half]
        turned = pairs * np.exp(1j * angles)
        return np.concatenate([turned.real, turned.imag, x[..., 2 * half :]], axis=-1)

    def _inner(self, x: Array, t: Mapping[str, Array]) -> Array:
        up = x @ t["up"].T + t.get("up.bias", 0.0)
        inner = self._activation(x @ t["gate"].T) * up if self._spec.gated else self._activation(up)
        return np.asarray(inner @ t["down"].T + t.get("down.bias", 0.0))

    def _activation(self, x: Array) -> Array:
        if self._spec.activation == "silu":
            return np.asarray(x / (1 + np.exp(-x)))
        return np.asarray(0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))
