"""The function of a decoder language model as plain data, which is all that a backend lowers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kedge_protocol.errors import ModelError

Array = npt.NDArray[Any]

ROTARY_KINDS = ("default", "linear", "llama3")
TEXT = "text"
SOUND = "sound"
"""The kinds of encoders: of tokens, and of log-mel features."""


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary position embedding, half-split pairs (Su et al., "RoFormer", 2021).

    Attributes:
        theta: base of the frequencies.
        share: share of a head's channels that are rotated, from the first on.
        kind: ``default``; ``linear`` divides all frequencies by ``factor``; ``llama3`` only the low ones (Llama 3.1).
        low_frequency_factor, high_frequency_factor, original_context: parameters of ``llama3``.
        divisors: divisor of each pair's frequency, for a scaling that is stored as a table; empty for none.
    """

    theta: float
    share: float = 1.0
    kind: str = "default"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_context: int = 8192
    divisors: tuple[float, ...] = ()

    def frequencies(self, head_size: int) -> Array:
        """Return radians per position of each pair, float64 [rotated channels / 2]."""
        turning = int(head_size * self.share)
        plain = self.theta ** (-np.arange(0, turning, 2, dtype=np.float64) / turning)
        if self.divisors:
            plain = plain / np.array(self.divisors)
        if self.kind == "linear":
            return plain / self.factor
        if self.kind != "llama3":
            return plain
        # Meta's reference: long waves are divided, short ones kept, those between blended.
        wave = 2 * math.pi / plain
        low, high = self.low_frequency_factor, self.high_frequency_factor
        smooth = np.clip((self.original_context / wave - low) / (high - low), 0, 1)
        return (1 - smooth) * plain / self.factor + smooth * plain


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """The attention span and position encoding of one layer.

    Attributes:
        window: number of visible positions, its own included; None for all.
        rotary: its rotary embedding; None if positions are learned.
    """

    rotary: Rotary | None
    window: int | None = None


@dataclass(frozen=True, kw_only=True)
class RelativePositions:
    """Position biases of attention scores by distance (Raffel et al., "T5", JMLR 2020).

    Attributes:
        buckets: number of learned biases of each head; near distances have one of their own, farther ones share.
        largest: distance from which on all share the last.
    """

    buckets: int
    largest: int

    def of(self, distances: Array, *, both_ways: bool) -> Array:
        """Return the bucket of each distance (position of the key less the query's), int64 of the same shape.

        Args:
            both_ways: whether keys after the query are seen too; they have the upper half of the buckets.
        """
        count = self.buckets // 2 if both_ways else self.buckets
        upper = np.where(distances > 0, count, 0) if both_ways else 0
        away = np.abs(distances) if both_ways else np.maximum(-distances, 0)
        exact = count // 2
        # In float32, as transformers computes it: a distance at the edge of a bucket falls where it does there.
        ratio = np.maximum(away, 1).astype(np.float32) / np.float32(exact)
        steps = np.log(ratio) / np.float32(math.log(self.largest / exact)) * np.float32(count - exact)
        far = np.minimum(exact + steps.astype(np.int64), count - 1)
        found: Array = upper + np.where(away < exact, away, far)
        return found


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """The encoder whose output a decoder attends to. Norms, activation and gates are the decoder's.

    Attributes:
        kind: ``text`` (tokens) or ``sound`` (log-mel features, halved in time by two convolutions).
        layers: number of layers.
        heads, head_size, intermediate, attention_scale: as in :class:`DecoderSpec`.
        context: largest number of its positions; a sound always has all of them.
        vocabulary: number of tokens; 0 for a sound.
        mels: features of a frame; 0 for a text.
        own_embedding: whether tokens have another embedding than the decoder's.
    """

    kind: str
    layers: int
    heads: int
    head_size: int
    intermediate: int
    attention_scale: float
    context: int
    vocabulary: int = 0
    mels: int = 0
    own_embedding: bool = False


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """A decoder without its weights.

    Attributes:
        architecture: the source's name of the architecture (``llama``).
        hidden, intermediate: channels between layers, and inside the feed-forward network.
        heads, kv_heads, head_size: attention heads, key-value heads (a divisor of ``heads``), channels of a head.
        context: largest number of positions.
        layers: one entry per layer.
        activation: ``silu``, ``gelu``, ``gelu_tanh`` or ``relu``.
        gated: whether the feed-forward network multiplies two projections (``down(act(gate(x)) * up(x))``).
        norm: ``rms`` or ``layer`` (with biases).
        norm_offset: added to a stored norm weight (Gemma stores weight - 1).
        qk_norm: whether queries and keys are normalized per head.
        post_norms: whether the outputs of attention and feed-forward are also normalized before they are added (Gemma
            3).
        attention_scale: factor of the products of queries and keys.
        embedding_scale: factor of the embedded tokens.
        tied: whether the head is the embedding.
        learned_positions: whether a table of positions is added to the embedded tokens.
        norm_last: whether a norm follows each sum of a layer's parts rather than precede the next part; then there is
            none before the head.
        relative: biases of attention by distance; None for none.
        head_scale: factor of the head's input.
        head_bias: whether the head has a bias.
        encoder: the encoder that all layers attend to; None for a decoder alone.
    """

    architecture: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    context: int
    layers: tuple[LayerKind, ...]
    activation: str
    norm_epsilon: float
    attention_scale: float
    gated: bool = True
    norm: str = "rms"
    norm_offset: float = 0.0
    qk_norm: bool = False
    post_norms: bool = False
    embedding_scale: float = 1.0
    tied: bool = True
    learned_positions: bool = False
    norm_last: bool = False
    relative: RelativePositions | None = None
    head_scale: float = 1.0
    head_bias: bool = False
    encoder: EncoderSpec | None = None


class Weights(Protocol):
    """A decoder's float weights, read on demand.

    Matrices are float32 [out, in]. The names, each optionally with a ``.bias``: ``embedding``, ``positions``, ``norm``,
    ``head``; in a layer ``attention_norm``, ``q``, ``k``, ``v``, ``q_norm``, ``k_norm``, ``o``,
    ``attention_post_norm``, ``feed_forward_norm``, ``gate`` (gated only), ``up``, ``down``, ``feed_forward_post_norm``.

    With an encoder a layer has ``cross_norm``, ``cross_q``, ``cross_k``, ``cross_v`` and ``cross_o`` too, and outside
    the layers there are ``relative`` and ``encoder.relative`` [buckets, heads], ``encoder.embedding``,
    ``encoder.positions``, ``encoder.norm``, ``first`` and ``second`` (convolutions [out, in, 3]), and ``head.bias``.
    """

    def outer(self, name: str) -> Array:
        """Return a tensor outside the layers."""

    def layer(self, index: int) -> dict[str, Array]:
        """Return all tensors of one layer by name."""


def check(spec: DecoderSpec, *, where: str) -> None:
    """Raise :class:`ModelError` if the numbers of a specification are inconsistent."""
    tests: tuple[tuple[bool, str], ...] = (
        (min(spec.hidden, spec.intermediate, spec.heads, spec.kv_heads, spec.head_size) > 0, "a size is not positive"),
        (spec.kv_heads > 0 and spec.heads % spec.kv_heads == 0, "num_key_value_heads does not divide the heads"),
        (spec.head_size % 2 == 0, "head_dim is odd, rotary embedding turns pairs"),
        (spec.vocabulary > 1 and spec.context > 1, "vocab_size or max_position_embeddings is too small"),
        (len(spec.layers) > 0, "num_hidden_layers is not positive"),
    )
    for holds, what in tests:
        if not holds:
            raise ModelError(what, where=where, remedy="Give the folder as it was published")
