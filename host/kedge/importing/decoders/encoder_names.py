"""Maps the tensor names of T5, Marian and Whisper to :class:`kedge_targets.decoder.spec.Weights`."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge.importing.decoders.encoder_config import MARIAN, T5
from kedge.importing.decoders.names import Reader, check_shapes
from kedge_protocol.errors import ModelError
from kedge_targets.decoder.spec import DecoderSpec

Array = npt.NDArray[Any]

_T5_ATTENTION = {name: name for name in "qkvo"}
_BART_ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
# Constants that follow from the configuration, and copies of the embedding.
_IGNORED = re.compile(
    r"(model\.)?(encoder|decoder)\.embed_tokens\.weight|model\.shared\.weight|lm_head\.weight|proj_out\.weight|"
    r"model\.(encoder|decoder)\.embed_positions\.weight|"
    r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
)


class EncoderDecoderWeights:
    """The weights of one encoder-decoder.

    Attributes:
        spec: the specification; whether the head is the embedding is known from the tensors alone.

    Raises:
        ModelError: a tensor is missing, has another shape than the configuration says, or is unknown.
    """

    def __init__(self, tensors: Reader, spec: DecoderSpec, *, where: str) -> None:
        self._tensors = tensors
        self._where = where
        head = next((name for name in ("lm_head.weight", "proj_out.weight") if name in tensors.names), None)
        self.spec = replace(spec, tied=head is None)
        self._outer = _outer(self.spec, tensors.names)
        if head is not None:
            self._outer["head"] = (head, (spec.vocabulary, spec.hidden))
        self._check()

    def outer(self, name: str) -> Array:
        """See :meth:`kedge_targets.decoder.spec.Weights.outer`."""
        if self.spec.architecture == MARIAN and name in ("positions", "encoder.positions"):
            return sinusoids(self.spec.context, self.spec.hidden)
        if name == "head.bias" and "final_logits_bias" not in self._tensors.names:
            return np.zeros(self.spec.vocabulary, np.float32)
        stored, _ = self._outer[name]
        found = self._tensors.read(stored)
        return found.reshape(-1) if name == "head.bias" else found

    def has_bias(self, name: str) -> bool:
        """Return whether a tensor outside the layers has a bias."""
        return f"{name}.bias" in self._outer

    def has(self, name: str) -> bool:
        """Return whether there is a tensor of this name outside the layers."""
        return name in self._outer or (self.spec.architecture == MARIAN and name.endswith("positions"))

    def layer(self, index: int) -> dict[str, Array]:
        """See :meth:`kedge_targets.decoder.spec.Weights.layer`."""
        return self._read(_layer(self.spec, index))

    def encoder_layer(self, index: int) -> dict[str, Array]:
        """Return the tensors of a layer of the encoder, by the same names."""
        return self._read(_encoder_layer(self.spec, index))

    def _read(self, table: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, Array]:
        return {own: self._tensors.read(stored) for own, (stored, _) in table.items()}

    def _check(self) -> None:
        wanted = dict(self._outer.values()) | layer_shapes(self.spec)
        check_shapes(self._tensors, wanted, where=self._where)
        extra = sorted(name for name in self._tensors.names - set(wanted) if not _IGNORED.fullmatch(name))
        if extra:
            raise ModelError(
                f"holds the tensor {extra[0]!r}, which no {self.spec.architecture} has",
                where=self._where,
                remedy="Export the model to ONNX",
            )


def sinusoids(positions: int, channels: int) -> Array:
    """Return Marian's table of positions, float32 [positions, channels]: sines in the first half of the channels,
    cosines in the second (Vaswani et al., 2017)."""
    angles = np.outer(np.arange(positions), 10000.0 ** (-np.arange(0, channels, 2) / channels))
    return np.concatenate([np.sin(angles), np.cos(angles)[:, : channels // 2]], axis=1).astype(np.float32)


def expected_shapes(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Return name in the file → shape of every tensor that an encoder-decoder must have."""
    found = dict(_outer(spec, set()).values()) | layer_shapes(spec)
    return found if spec.tied else {**found, "lm_head.weight": (spec.vocabulary, spec.hidden)}


def layer_shapes(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Return name in the file → shape of every tensor of the layers."""
    tables = [_layer(spec, index) for index in range(len(spec.layers))]
    if spec.encoder is not None:
        tables += [_encoder_layer(spec, index) for index in range(spec.encoder.layers)]
    return {stored: shape for table in tables for stored, shape in table.values()}


_Table = dict[str, tuple[str, tuple[int, ...]]]
"""Own name → name in the file, shape."""


def _outer(spec: DecoderSpec, there: set[str]) -> _Table:
    hidden, encoder = spec.hidden, spec.encoder
    if encoder is None:
        raise ModelError("has no encoder", where=spec.architecture)
    words, sources = (spec.vocabulary, hidden), (encoder.vocabulary, hidden)
    if spec.architecture == T5:
        stem = "{}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        buckets = spec.relative.buckets if spec.relative is not None else 0
        return {
            "embedding": (_first(there, "shared.weight", "decoder.embed_tokens.weight"), words),
            "norm": ("decoder.final_layer_norm.weight", (hidden,)),
            "relative": (stem.format("decoder"), (buckets, spec.heads)),
            "encoder.relative": (stem.format("encoder"), (buckets, encoder.heads)),
            "encoder.norm": ("encoder.final_layer_norm.weight", (hidden,)),
        }
    own = "model.decoder.embed_tokens.weight"
    if spec.architecture == MARIAN:
        found: _Table = {
            "embedding": (own if encoder.own_embedding else _first(there, "model.shared.weight", own), words)
        }
        if encoder.own_embedding:
            found["encoder.embedding"] = ("model.encoder.embed_tokens.weight", sources)
        if "final_logits_bias" in there:
            found["head.bias"] = ("final_logits_bias", (1, spec.vocabulary))
        return found
    found = {"embedding": (own, words)}
    found["positions"] = ("model.decoder.embed_positions.weight", (spec.context, hidden))
    found["encoder.positions"] = ("model.encoder.embed_positions.weight", (encoder.context, hidden))
    for ours, stored in (("norm", "model.decoder.layer_norm"), ("encoder.norm", "model.encoder.layer_norm")):
        found |= {ours: (f"{stored}.weight", (hidden,)), f"{ours}.bias": (f"{stored}.bias", (hidden,))}
    for ours, stored, taken in (("first", "conv1", encoder.mels), ("second", "conv2", hidden)):
        found[ours] = (f"model.encoder.{stored}.weight", (hidden, taken, 3))
        found[f"{ours}.bias"] = (f"model.encoder.{stored}.bias", (hidden,))
    return found


def _first(there: set[str], *names: str) -> str:
    return next((name for name in names if name in there), names[0])


def _layer(spec: DecoderSpec, index: int) -> _Table:
    if spec.architecture == T5:
        base = f"decoder.block.{index}.layer"
        return {
            **_t5_attention(spec, f"{base}.0", "SelfAttention", "", "attention_norm"),
            **_t5_attention(spec, f"{base}.1", "EncDecAttention", "cross_", "cross_norm"),
            **_t5_inner(spec, f"{base}.2"),
        }
    base = f"model.decoder.layers.{index}"
    return {
        **_bart_attention(spec, f"{base}.self_attn", "", "attention_norm"),
        **_bart_attention(spec, f"{base}.encoder_attn", "cross_", "cross_norm"),
        **_bart_inner(spec, base, spec.intermediate),
    }


def _encoder_layer(spec: DecoderSpec, index: int) -> _Table:
    if spec.architecture == T5:
        base = f"encoder.block.{index}.layer"
        attention = _t5_attention(spec, f"{base}.0", "SelfAttention", "", "attention_norm")
        return {**attention, **_t5_inner(spec, f"{base}.1")}
    base = f"model.encoder.layers.{index}"
    inner = spec.encoder.intermediate if spec.encoder is not None else 0
    return {**_bart_attention(spec, f"{base}.self_attn", "", "attention_norm"), **_bart_inner(spec, base, inner)}


def _t5_attention(spec: DecoderSpec, base: str, kind: str, prefix: str, norm: str) -> _Table:
    hidden, inner = spec.hidden, spec.heads * spec.head_size
    shapes = {**dict.fromkeys("qkv", (inner, hidden)), "o": (hidden, inner)}
    found: _Table = {
        prefix + own: (f"{base}.{kind}.{stored}.weight", shapes[own]) for own, stored in _T5_ATTENTION.items()
    }
    return {**found, norm: (f"{base}.layer_norm.weight", (hidden,))}


def _t5_inner(spec: DecoderSpec, base: str) -> _Table:
    hidden, inner = spec.hidden, spec.intermediate
    parts = {"gate": "wi_0", "up": "wi_1"} if spec.gated else {"up": "wi"}
    found: _Table = {own: (f"{base}.DenseReluDense.{name}.weight", (inner, hidden)) for own, name in parts.items()}
    found["down"] = (f"{base}.DenseReluDense.wo.weight", (hidden, inner))
    return {**found, "feed_forward_norm": (f"{base}.layer_norm.weight", (hidden,))}


def _bart_attention(spec: DecoderSpec, base: str, prefix: str, norm: str) -> _Table:
    hidden = spec.hidden
    found: _Table = {}
    for own, stored in _BART_ATTENTION.items():
        found[prefix + own] = (f"{base}.{stored}.weight", (hidden, hidden))
        # Whisper's keys have no bias.
        if own != "k" or spec.architecture == MARIAN:
            found[f"{prefix}{own}.bias"] = (f"{base}.{stored}.bias", (hidden,))
    return {**found, **_norm(norm, f"{base}_layer_norm", hidden)}


def _bart_inner(spec: DecoderSpec, base: str, inner: int) -> _Table:
    hidden = spec.hidden
    return {
        "up": (f"{base}.fc1.weight", (inner, hidden)),
        "up.bias": (f"{base}.fc1.bias", (inner,)),
        "down": (f"{base}.fc2.weight", (hidden, inner)),
        "down.bias": (f"{base}.fc2.bias", (hidden,)),
        **_norm("feed_forward_norm", f"{base}.final_layer_norm", hidden),
    }


def _norm(own: str, stored: str, hidden: int) -> _Table:
    return {own: (f"{stored}.weight", (hidden,)), f"{own}.bias": (f"{stored}.bias", (hidden,))}
