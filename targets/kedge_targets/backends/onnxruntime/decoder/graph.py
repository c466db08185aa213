"""A decoder as a graph of ONNX Runtime's fused operators (com.microsoft, docs/ContribOperators.md there)::

    input_ids [batch, step] int64      tokens that follow those in the cache
    keep [1] int64                     number of last positions whose logits are computed
    seqlens_k [batch] int32            positions of each row after this step, less 1
    total [1] int32                    the largest of them, plus 1
    position_ids [batch, step] int64   only if positions are learned
    past.L.k, past.L.v                 [batch, kv heads, room, head size]; present.L.k and .v are the same buffers;
                                       float32, or int8 with a scale for each channel
    → logits [batch, keep, vocabulary] float32

A part of the layers has ``hidden`` [batch, step, channels] as input and output instead.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from kedge_targets.backends.onnxruntime.decoder.writer import MICROSOFT, GraphWriter
from kedge_targets.decoder.layout import HeadLayout
from kedge_targets.decoder.matrix import Codes, Matrix, stacked
from kedge_targets.decoder.plan import Piece
from kedge_targets.decoder.spec import DecoderSpec, LayerKind

Array = npt.NDArray[Any]

_FLOAT, _INT64, _INT32, _INT8 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32, TensorProto.INT8
_SCALES_AT = 12
"""Index of GroupQueryAttention's input with the scales of stored keys; that of values follows."""


class DecoderGraph:
    """Writes a decoder, or a part of its layers, into a :class:`GraphWriter`: the beginning, each layer in order, the
    end.

    Args:
        context: largest number of positions.
        probes: whether the inputs of each layer's matrices are also outputs
            (:data:`kedge_targets.decoder.plan.PROBES`).
    """

    def __init__(
        self, writer: GraphWriter, spec: DecoderSpec, layout: HeadLayout, *, context: int, probes: bool = False
    ) -> None:
        self._w = writer
        self._spec = spec
        self._layout = layout
        self._probes = probes
        self._context = context
        self._rotary: dict[LayerKind, tuple[str, str]] = {}
        self._hidden = ""
        self._added = ""
        """The tensor still to be added to the hidden state; the next norm does both in one operator."""
        self._shared: tuple[Codes, tuple[str, str, str]] | None = None
        self._embedding = ""

    def begin(self, embedding: Matrix | None, positions: Array | None = None) -> None:
        """Write the inputs and the embedding of tokens; ``embedding`` is None for a part that takes ``hidden``."""
        w, spec = self._w, self._spec
        if embedding is None:
            w.take("hidden", _FLOAT, ["batch", "step", spec.hidden])
            self._hidden = "hidden"
        else:
            w.take("input_ids", _INT64, ["batch", "step"])
            self._hidden = self._embedded(embedding)
            if spec.embedding_scale != 1:
                self._hidden = w.op("Mul", [self._hidden, w.constant(np.array(spec.embedding_scale, np.float32))])
        w.take("seqlens_k", _INT32, ["batch"])
        w.take("total", _INT32, [1])
        self._total = w.op("Squeeze", ["total", w.constant(np.array([0], np.int64))])
        if positions is not None:
            w.take("position_ids", _INT64, ["batch", "step"])
            table = w.constant(positions[: self._context].astype(np.float32), "positions")
            self._added = w.op("Gather", [table, "position_ids"])

    def _embedded(self, embedding: Matrix) -> str:
        w = self._w
        if isinstance(embedding, Codes):
            names = w.codes(embedding, "embedding")
            self._shared = (embedding, names)
            flat = embedding.shape[1] * embedding.bits // 8
            table = w.op("Reshape", [names[0], w.constant(np.array([embedding.shape[0], flat], np.int64))])
            inputs = [table, "input_ids", names[1], *([names[2]] if names[2] else [])]
            return w.op(
                "GatherBlockQuantized",
                inputs,
                domain=MICROSOFT,
                bits=embedding.bits,
                block_size=embedding.group,
                gather_axis=0,
                quantize_axis=1,
            )
        stored = w.constant(embedding, "embedding")
        found = w.op("Gather", [stored, "input_ids"])
        if embedding.dtype == np.float32:
            self._embedding = stored
            return found
        # As the head it is wanted in float32.
        self._embedding = w.op("Cast", [stored], to=_FLOAT)
        return w.op("Cast", [found], to=_FLOAT)

    def layer(self, index: int, piece: Piece) -> None:
        """Write one layer."""
        w, m, v = self._w, piece.matrices, piece.vectors
        normed = self._norm_of_sum("attention_norm", v)
        self._probe(index, "attention", normed)
        attended = self._attention(index, normed, piece)
        self._probe(index, "o", attended)
        out = w.product(attended, m["o"], f"{index}.o", v.get("o.bias"))
        self._added = self._post_norm("attention_post_norm", out, v)
        normed = self._norm_of_sum("feed_forward_norm", v)
        self._probe(index, "feed_forward", normed)
        inner = self._inner(index, normed, piece)
        self._probe(index, "down", inner)
        out = w.product(inner, m["down"], f"{index}.down", v.get("down.bias"))
        self._added = self._post_norm("feed_forward_post_norm", out, v)

    def end(self, norm: dict[str, Array] | None, head: Matrix | None) -> None:
        """Write norm and head. With ``head`` None the head is the embedding; with ``norm`` None the output is
        ``hidden`` itself."""
        w, spec = self._w, self._spec
        if norm is None:
            w.op("Add", [self._hidden, self._added], ["hidden_out"])
            w.give("hidden_out", _FLOAT, ["batch", "step", spec.hidden])
            return
        w.take("keep", _INT64, [1])
        normed = self._norm_of_sum("norm", norm)
        ends = [w.op("Neg", ["keep"]), w.constant(np.array([2**62], np.int64)), w.constant(np.array([1], np.int64))]
        last = w.op("Slice", [normed, *ends])
        if head is not None:
            w.product(last, head, "head", output="logits")
        elif self._shared is not None:
            w.shared_product(last, *self._shared, "logits")
        else:
            w.op("FusedMatMul", [last, self._embedding], ["logits"], domain=MICROSOFT, transB=1)
        w.give("logits", _FLOAT, ["batch", "keep", spec.vocabulary])

    def _attention(self, index: int, normed: str, piece: Piece) -> str:
        w, spec, kind = self._w, self._spec, self._spec.layers[index]
        stored = _FLOAT if piece.cache is None else _INT8
        for part in "kv":
            for end, listed in (("past", w.take), ("present", w.give)):
                listed(f"{end}.{index}.{part}", stored, ["batch", spec.kv_heads, "room", self._layout.size])
        matrices = [piece.matrices[name] for name in "qkv"]
        biases = [piece.vectors.get(f"{name}.bias") for name in "qkv"]
        bias = None if biases[0] is None else np.concatenate([one for one in biases if one is not None])
        whole = w.product(normed, stacked(matrices), f"{index}.qkv", bias)
        query, key, value = self._normed_heads(whole, piece.vectors) if spec.qk_norm else (whole, "", "")
        past = [f"past.{index}.k", f"past.{index}.v"]
        rotary = [] if kind.rotary is None else list(self._tables(kind))
        inputs = [query, key, value, *past, "seqlens_k", self._total, *rotary]
        types: dict[str, Any] = {}
        if piece.cache is not None:
            scales = [w.constant(one.reshape(-1).astype(np.float32)) for one in (piece.cache.keys, piece.cache.values)]
            inputs = [*inputs, *[""] * (_SCALES_AT - len(inputs)), *scales]
            types = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        return w.op(
            "GroupQueryAttention",
            inputs,
            [w.name("attention"), f"present.{index}.k", f"present.{index}.v"],
            domain=MICROSOFT,
            num_heads=spec.heads,
            kv_num_heads=spec.kv_heads,
            do_rotary=int(kind.rotary is not None),
            rotary_interleaved=0,
            scale=float(spec.attention_scale),
            local_window_size=kind.window or -1,
            **types,
        )

    def _normed_heads(self, whole: str, vectors: dict[str, Array]) -> tuple[str, str, str]:
        w, spec, size = self._w, self._spec, self._layout.size
        widths = [spec.heads * size, spec.kv_heads * size, spec.kv_heads * size]
        parts = [w.name(name) for name in "qkv"]
        w.op("Split", [whole, w.constant(np.array(widths, np.int64))], parts, axis=-1)
        # The kernel's heads may hold channels that are always 0: their mean of squares is smaller by this.
        epsilon = spec.norm_epsilon * self._layout.norm_factor()
        for at, (name, heads) in enumerate((("q_norm", spec.heads), ("k_norm", spec.kv_heads))):
            apart = w.op("Reshape", [parts[at], w.constant(np.array([0, 0, heads, size], np.int64))])
            scale = w.constant(vectors[name].astype(np.float32), name)
            normed = w.op("SimplifiedLayerNormalization", [apart, scale], axis=-1, epsilon=epsilon)
            parts[at] = w.op("Reshape", [normed, w.constant(np.array([0, 0, heads * size], np.int64))])
        return parts[0], parts[1], parts[2]

    def _inner(self, index: int, normed: str, piece: Piece) -> str:
        w, m, v = self._w, piece.matrices, piece.vectors
        if not self._spec.gated:
            return self._activated(w.product(normed, m["up"], f"{index}.up", v.get("up.bias")))
        biases = [v[name] for name in ("gate.bias", "up.bias") if name in v]
        bias = np.concatenate(biases) if biases else None
        both = w.product(normed, stacked([m["gate"], m["up"]]), f"{index}.gate_up", bias)
        gate, up = w.name("gate"), w.name("up")
        w.op("Split", [both], [gate, up], axis=-1, num_outputs=2)
        return w.op("Mul", [self._activated(gate), up])

    def _activated(self, value: str) -> str:
        if self._spec.activation == "silu":
            # x * sigmoid(alpha x) with alpha 1 is SiLU, in one node.
            return self._w.op("QuickGelu", [value], domain=MICROSOFT, alpha=1.0)
        return self._w.op("Gelu", [value], approximate="tanh")

    def _post_norm(self, name: str, value: str, vectors: dict[str, Array]) -> str:
        return self._norm(name, value, vectors) if self._spec.post_norms else value

    def _norm(self, name: str, value: str, vectors: dict[str, Array]) -> str:
        w, spec = self._w, self._spec
        scale = w.constant((vectors[name] + spec.norm_offset).astype(np.float32), name)
        if spec.norm == "rms":
            return w.op("SimplifiedLayerNormalization", [value, scale], axis=-1, epsilon=spec.norm_epsilon)
        bias = w.constant(vectors[f"{name}.bias"].astype(np.float32), name)
        return w.op("LayerNormalization", [value, scale, bias], axis=-1, epsilon=spec.norm_epsilon)

    def _norm_of_sum(self, name: str, vectors: dict[str, Array]) -> str:
        """Add the pending tensor to the hidden state, normalize the sum, and return the name of the result."""
        w, spec = self._w, self._spec
        if not self._added:
            return self._norm(name, self._hidden, vectors)
        inputs = [self._hidden, self._added, w.constant((vectors[name] + spec.norm_offset).astype(np.float32), name)]
        kind = "SkipSimplifiedLayerNormalization"
        if spec.norm == "layer":
            kind = "SkipLayerNormalization"
            inputs.append(w.constant(vectors[f"{name}.bias"].astype(np.float32), name))
        normed, total = w.name("normed"), w.name("sum")
        w.op(kind, inputs, [normed, "", "", total], domain=MICROSOFT, epsilon=spec.norm_epsilon)
        self._hidden, self._added = total, ""
        return normed

    def _tables(self, kind: LayerKind) -> tuple[str, str]:
        if kind not in self._rotary:
            angles = np.outer(np.arange(self._context), self._layout.frequencies(self._spec, kind))
            cosines, sines = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
            self._rotary[kind] = self._w.constant(cosines, "cosines"), self._w.constant(sines, "sines")
        return self._rotary[kind]

    def _probe(self, index: int, name: str, value: str) -> None:
        if self._probes:
            self._w.op("Identity", [value], [f"probe.{index}.{name}"])
            self._w.give(f"probe.{index}.{name}", _FLOAT, ["batch", "step", None])
