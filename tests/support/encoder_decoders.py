"""Random tiny encoder-decoders in Hugging Face's form, and one written out in float64 to compare with."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_targets.decoder.spec import SOUND, DecoderSpec
from tests.support import decoders

Array = npt.NDArray[Any]

VOCABULARY = decoders.VOCABULARY
SPECIAL = ("startoftranscript", "en", "de", "transcribe", "translate", "notimestamps", "nospeech")
"""Tokens of the tiny Whisper, after all letters."""
_T5 = {
    "model_type": "t5",
    "architectures": ["T5ForConditionalGeneration"],
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "n_positions": 64,
    "decoder_start_token_id": 0,
    "eos_token_id": 2,
    "task_specific_params": {"translation_en_to_de": {"prefix": "translate: "}},
}
_MARIAN = {
    "model_type": "marian",
    "architectures": ["MarianMTModel"],
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "max_position_embeddings": 64,
    "activation_function": "swish",
    "scale_embedding": True,
    "decoder_start_token_id": 0,
    "eos_token_id": 2,
    "bad_words_ids": [[0]],
}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "t5": _T5,
    "t5-gated": {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "marian": _MARIAN,
    "marian-apart": {**_MARIAN, "share_encoder_decoder_embeddings": False, "activation_function": "relu"},
    "whisper": {
        "model_type": "whisper",
        "architectures": ["WhisperForConditionalGeneration"],
        "vocab_size": VOCABULARY + len(SPECIAL),
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "num_mel_bins": 20,
        "max_source_positions": 100,
        "max_target_positions": 48,
        "activation_function": "gelu",
        "decoder_start_token_id": VOCABULARY,
        "eos_token_id": 2,
    },
}


def folder(path: Path, name: str, *, changed: Mapping[str, Any] | None = None) -> Path:
    """Write a random model of a known configuration; ``t5-gated`` has a head of its own.

    Args:
        changed: keys of the configuration with other values.
    """
    from kedge.importing.decoders import encoder_config, encoder_names

    path.mkdir(parents=True, exist_ok=True)
    raw = {**CONFIGURATIONS[name], **(changed or {})}
    spec = replace(encoder_config.spec_of(raw, where=name), tied=name != "t5-gated")
    random = np.random.default_rng(7)
    tensors = {
        title: random.normal(0, 0.25 if len(shape) > 1 else 0.5, shape).astype(np.float32)
        for title, shape in encoder_names.expected_shapes(spec).items()
    }
    if name.startswith("marian"):
        tensors["final_logits_bias"] = random.normal(0, 1, (1, spec.vocabulary)).astype(np.float32)
    (path / "config.json").write_text(json.dumps(raw))
    decoders.write_shards(path, tensors)
    decoders.tokenizer(path)
    if name == "whisper":
        _with_special_tokens(path / "tokenizer.json")
    return path


def _with_special_tokens(path: Path) -> None:
    whole = json.loads(path.read_text())
    for at, name in enumerate(SPECIAL):
        one = {**whole["added_tokens"][0], "id": VOCABULARY + at, "content": f"<|{name}|>"}
        whole["added_tokens"].append(one)
    path.write_text(json.dumps(whole))


class PlainEncoderDecoder(decoders.PlainDecoder):
    """An encoder-decoder in float64, whole sequences at once, written from the papers and not from Kedge's graph."""

    def __init__(self, spec: DecoderSpec, weights: Any, source: Array) -> None:
        super().__init__(spec, weights)
        self._source = self._encoded(source)

    def logits(self, tokens: list[int]) -> Array:
        """Float64 [positions, vocabulary]."""
        spec, w = self._spec, self._weights
        x = self._embedded("embedding", "positions", np.array(tokens))
        length = len(tokens)
        back = np.arange(length)[None] - np.arange(length)[:, None]
        bias = np.where(back > 0, -np.inf, 0.0) + self._distances("relative", back, both=False)
        for index in range(len(spec.layers)):
            t = {name: value.astype(np.float64) for name, value in w.layer(index).items()}
            x = self._part(x, t, "attention_norm", lambda y, t=t: self._attend(y, y, t, "", spec.heads, bias))
            x = self._part(
                x, t, "cross_norm", lambda y, t=t: self._attend(y, self._source, t, "cross_", spec.heads, 0.0)
            )
            x = self._part(x, t, "feed_forward_norm", lambda y, t=t: self._inner(y, t))
        head = w.outer("embedding" if spec.tied else "head").astype(np.float64)
        found = self._last(x, "norm") * spec.head_scale @ head.T
        return np.asarray(found + w.outer("head.bias") if spec.head_bias else found)

    def _encoded(self, source: Array) -> Array:
        w, encoder = self._weights, self._spec.encoder
        assert encoder is not None
        if encoder.kind == SOUND:
            x = source.astype(np.float64)
            for name, stride in (("first", 1), ("second", 2)):
                x = self._activation(self._convolved(x, w.outer(name), w.outer(f"{name}.bias"), stride))
            x = x.T + w.outer("encoder.positions")
        else:
            x = self._embedded(
                "encoder.embedding" if encoder.own_embedding else "embedding", "encoder.positions", source
            )
        apart = np.arange(len(x))[None] - np.arange(len(x))[:, None]
        bias = self._distances("encoder.relative", apart, both=True)
        for index in range(encoder.layers):
            t = {name: value.astype(np.float64) for name, value in w.encoder_layer(index).items()}
            x = self._part(x, t, "attention_norm", lambda y, t=t: self._attend(y, y, t, "", encoder.heads, bias))
            x = self._part(x, t, "feed_forward_norm", lambda y, t=t: self._inner(y, t))
        return self._last(x, "encoder.norm")

    @staticmethod
    def _convolved(x: Array, weight: Array, bias: Array, stride: int) -> Array:
        padded = np.pad(x, ((0, 0), (1, 1)))
        frames = np.lib.stride_tricks.sliding_window_view(padded, 3, axis=1)[:, ::stride]
        return np.asarray(np.einsum("ctk,ock->ot", frames, weight.astype(np.float64)) + bias[:, None])

    def _embedded(self, table: str, positions: str, tokens: Array) -> Array:
        x = self._weights.outer(table).astype(np.float64)[tokens] * self._spec.embedding_scale
        return x + self._weights.outer(positions)[: len(tokens)] if self._spec.learned_positions else np.asarray(x)

    def _part(self, x: Array, t: Mapping[str, Array], norm: str, run: Any) -> Array:
        if self._spec.norm_last:
            return self._norm(x + run(x), t, norm)
        return np.asarray(x + run(self._norm(x, t, norm)))

    def _last(self, x: Array, name: str) -> Array:
        w = self._weights
        if not w.has(name):
            return x
        there = [end for end in ("", ".bias") if w.has(name + end)]
        return self._norm(x, {"norm" + end: w.outer(name + end).astype(np.float64) for end in there}, "norm")

    def _attend(self, x: Array, y: Array, t: Mapping[str, Array], prefix: str, heads: int, bias: Any) -> Array:
        def heads_of(value: Array, name: str) -> Array:
            made = value @ t[prefix + name].T + t.get(f"{prefix}{name}.bias", 0.0)
            return np.asarray(made.reshape(len(value), heads, -1).transpose(1, 0, 2))

        q, k, v = heads_of(x, "q"), heads_of(y, "k"), heads_of(y, "v")
        scale = 1.0 if self._spec.architecture == "t5" else q.shape[-1] ** -0.5
        scores = q @ k.transpose(0, 2, 1) * scale + bias
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        joined = (shares @ v).transpose(1, 0, 2).reshape(len(x), -1)
        return np.asarray(joined @ t[f"{prefix}o"].T + t.get(f"{prefix}o.bias", 0.0))

    def _distances(self, name: str, apart: Array, *, both: bool) -> Any:
        """T5's biases, bucket by bucket as its paper's code has it."""
        how = self._spec.relative
        if how is None:
            return 0.0
        count = how.buckets // 2 if both else how.buckets

        def bucket(distance: int) -> int:
            upper = count if both and distance > 0 else 0
            away = abs(distance) if both else max(0, -distance)
            exact = count // 2
            if away < exact:
                return upper + away
            steps = math.log(away / exact) / math.log(how.largest / exact) * (count - exact)
            return upper + min(count - 1, exact + int(steps + 1e-9))

        table = self._weights.outer(name).astype(np.float64)
        return table[np.vectorize(bucket)(apart)].transpose(2, 0, 1)

    def _activation(self, x: Array) -> Array:
        kind = self._spec.activation
        if kind == "relu":
            return np.maximum(x, 0)
        if kind == "gelu":
            return np.asarray(0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))))
        return super()._activation(x)
