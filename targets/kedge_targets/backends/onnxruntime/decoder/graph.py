"""A decoder as a graph of ONNX Runtime's fused operators (com.microsoft, docs/ContribOperators.md there)::

    input_ids [batch, step] int64      tokens that follow those in the cache
    keep [1] int64                     number of last positions whose logits are computed
    seqlens_k [batch] int32            positions of each row after this step, less 1
    total [1] int32                    the largest of them, plus 1
    position_ids [batch, step] int64   only if positions are learned or have biases
    past.L.k, past.L.v                 [batch, kv heads, room, head size]; present.L.k and .v are the same buffers;
                                       float32 (float16 in a graph that computes in it), or int8 with a scale for each
                                       channel; of a layer with a window the room is a number, see decoder/windows.py
    cross.L.k, cross.L.v               [batch, heads, source, head size] float32: of an encoder, if there is one
    source_mask [batch, source] int32  1 where a text's encoder has a position
    → logits [batch, keep, vocabulary] float32

Layers after others have ``hidden`` [batch, step, channels] as input in place of ``input_ids``, and layers before others
``hidden_out`` of this shape as output; the head then is a graph of its own (``hidden`` and ``keep`` → ``logits``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from kedge_targets.backends.onnxruntime.decoder.blocks import Blocks
from kedge_targets.backends.onnxruntime.decoder.windows import window_of
from kedge_targets.backends.onnxruntime.decoder.writer import MICROSOFT, GraphWriter
from kedge_targets.decoder.layout import HeadLayout
from kedge_targets.decoder.matrix import Codes, Matrix
from kedge_targets.decoder.plan import Piece
from kedge_targets.decoder.spec import TEXT, DecoderSpec, LayerKind

Array = npt.NDArray[Any]

_FLOAT, _INT64, _INT32, _INT8 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32, TensorProto.INT8
_BIAS_AT = 10
"""Index of GroupQueryAttention's input with biases of scores."""
_SCALES_AT = 12
"""Index of GroupQueryAttention's input with the scales of stored keys; that of values follows."""


class DecoderGraph(Blocks):
    """Writes a decoder, or a part of its layers, into a :class:`GraphWriter`: the beginning, each layer in order, the
    end.

    Args:
        context: largest number of positions.
        probes: whether the inputs of each layer's matrices are also outputs
            (:data:`kedge_targets.decoder.plan.PROBES`).
        windows: whether layers with a window have caches of their own size (``decoder/windows.py``).
    """

    def __init__(
        self,
        writer: GraphWriter,
        spec: DecoderSpec,
        layout: HeadLayout,
        *,
        context: int,
        probes: bool = False,
        windows: bool = False,
    ) -> None:
        super().__init__(writer, spec)
        self._layout = layout
        self._probes = probes
        self._windows = windows
        self._context = context
        self._rotary: dict[LayerKind, tuple[str, str]] = {}
        self._bias = ""
        self._count = ""

    def begin(self, embedding: Matrix | None, positions: Array | None = None, relative: Array | None = None) -> None:
        """Write the inputs and the embedding of tokens; ``embedding`` is None for a part that takes ``hidden``."""
        w, spec = self._w, self._spec
        if embedding is None:
            w.take("hidden", w.real, ["batch", "step", spec.hidden])
            self._hidden = "hidden"
        else:
            w.take("input_ids", _INT64, ["batch", "step"])
            self._hidden = self._embedded(embedding)
        w.take("seqlens_k", _INT32, ["batch"])
        w.take("total", _INT32, [1])
        self._count = w.op("Squeeze", ["total", w.constant(np.array([0], np.int64))])
        if positions is not None or relative is not None:
            w.take("position_ids", _INT64, ["batch", "step"])
        if positions is not None:
            table = w.numbers(positions[: self._context], "positions")
            self._added = w.op("Gather", [table, "position_ids"])
            if spec.norm_last:
                self._total()
        if relative is not None:
            self._bias = self._biases(relative)
        if spec.encoder is not None and spec.encoder.kind == TEXT:
            w.take("source_mask", _INT32, ["batch", spec.encoder.context])

    def _biases(self, relative: Array) -> str:
        """Return the biases of a step's positions and all before them, float32 [batch, heads, step, total]."""
        w, spec = self._w, self._spec
        if spec.relative is None:
            raise ValueError("biases without buckets")
        buckets = spec.relative.of(-np.arange(self._context), both_ways=False)
        table = w.numbers(np.ascontiguousarray(relative[buckets].T), "relative")
        zero, one = w.constant(np.array(0, np.int64)), w.constant(np.array(1, np.int64))
        places = w.op("Range", [zero, w.op("Cast", [self._count], to=_INT64), one])
        rows = w.op("Unsqueeze", ["position_ids", w.constant(np.array([2], np.int64))])
        # Places after a row's own are masked; their bias is any.
        back = w.op("Max", [w.op("Sub", [rows, places]), zero])
        return w.op("Transpose", [w.op("Gather", [table, back], axis=1)], perm=[1, 0, 2, 3])

    def layer(self, index: int, piece: Piece) -> None:
        """Write one layer."""
        w, m, v, stem = self._w, piece.matrices, piece.vectors, str(index)
        normed = self._before("attention_norm", v)
        self._probe(index, "attention", normed)
        attended = self._attention(index, normed, piece)
        self._probe(index, "o", attended)
        out = w.product(attended, m["o"], f"{stem}.o", v.get("o.bias"))
        self._after("attention_norm", "attention_post_norm", out, v)
        if self._spec.encoder is not None:
            attended = self._cross_attention(index, self._before("cross_norm", v), piece)
            out = w.product(attended, m["cross_o"], f"{stem}.cross_o", v.get("cross_o.bias"))
            self._after("cross_norm", "", out, v)
        normed = self._before("feed_forward_norm", v)
        self._probe(index, "feed_forward", normed)
        inner = self._inner(stem, normed, piece)
        self._probe(index, "down", inner)
        out = w.product(inner, m["down"], f"{stem}.down", v.get("down.bias"))
        self._after("feed_forward_norm", "feed_forward_post_norm", out, v)

    def go_on(self) -> None:
        """Write the inputs of layers after others; see :meth:`begin`."""
        self.begin(None)
        self._resume()

    def head(self, embedding: Matrix, norm: dict[str, Array], head: Matrix | None, bias: Array | None = None) -> None:
        """Write norm and head as a graph of their own, from ``hidden`` to ``logits``; see :meth:`end`."""
        self._w.take("hidden", self._w.real, ["batch", "step", self._spec.hidden])
        self._hidden = "hidden"
        self._resume()
        if head is None and not isinstance(embedding, Codes):
            self._embedding = self._w.weights(embedding, "embedding")
        self.end(norm, embedding if head is None and isinstance(embedding, Codes) else head, bias)

    def stop(self) -> None:
        """Write the output of layers before others."""
        # The whole graph adds and normalizes in one operator, into which ONNX Runtime draws a bias. The same operator
        # here, and added zeros in _resume, make the same sums in the same order: the same bits.
        ones = np.ones(self._spec.hidden, np.float32)
        self._norm_of_sum("ones", {"ones": ones, "ones.bias": np.zeros_like(ones)})
        self._w.op("Identity", [self._hidden], ["hidden_out"])
        self._w.give("hidden_out", self._w.real, ["batch", "step", self._spec.hidden])

    def _resume(self) -> None:
        self._added = self._w.op("Sub", [self._hidden, self._hidden])

    def end(self, norm: dict[str, Array] | None, head: Matrix | None, bias: Array | None = None) -> None:
        """Write norm and head. With ``head`` None the head is the embedding; with ``norm`` None the output is
        ``hidden`` itself."""
        w, spec = self._w, self._spec
        if norm is None:
            w.op("Add", [self._hidden, self._added], ["hidden_out"])
            w.give("hidden_out", w.real, ["batch", "step", spec.hidden])
            return
        w.take("keep", _INT64, [1])
        normed = self._norm_of_sum("norm", norm) if norm else self._total()
        ends = [w.op("Neg", ["keep"]), w.constant(np.array([2**62], np.int64)), w.constant(np.array([1], np.int64))]
        last = w.op("Slice", [normed, *ends])
        if spec.head_scale != 1:
            last = w.op("Mul", [last, w.numbers(np.array(spec.head_scale))])
        stored = "logits" if w.real == _FLOAT else w.name("logits")
        made = stored if bias is None else w.name("scores")
        if head is not None:
            w.product(last, head, "head", output=made)
        elif self._shared is not None:
            w.shared_product(last, *self._shared, made)
        else:
            w.op("FusedMatMul", [last, self._embedding], [made], domain=MICROSOFT, transB=1)
        if bias is not None:
            w.op("Add", [made, w.numbers(bias, "head.bias")], [stored])
        if stored != "logits":
            w.op("Cast", [stored], ["logits"], to=_FLOAT)
        w.give("logits", _FLOAT, ["batch", "keep", spec.vocabulary])

    def _cross_attention(self, index: int, normed: str, piece: Piece) -> str:
        w, spec, encoder = self._w, self._spec, self._spec.encoder
        if encoder is None:
            raise ValueError("no encoder")
        names = [f"cross.{index}.{part}" for part in "kv"]
        for name in names:
            w.take(name, w.real, ["batch", spec.heads, encoder.context, spec.head_size])
        query = w.product(normed, piece.matrices["cross_q"], f"{index}.cross_q", piece.vectors.get("cross_q.bias"))
        mask = ["", "source_mask"] if encoder.kind == TEXT else []
        return w.op(
            "MultiHeadAttention",
            [query, *names, *mask],
            domain=MICROSOFT,
            num_heads=spec.heads,
            scale=float(spec.attention_scale),
        )

    def _attention(self, index: int, normed: str, piece: Piece) -> str:
        w, spec, kind = self._w, self._spec, self._spec.layers[index]
        stored = w.real if piece.cache is None else _INT8
        window = window_of(kind, self._context) if self._windows else None
        room = "room" if window is None else window.room
        for part in "kv":
            for end, listed in (("past", w.take), ("present", w.give)):
                listed(f"{end}.{index}.{part}", stored, ["batch", spec.kv_heads, room, self._layout.size])
        whole = self._queries_keys_values(str(index), normed, piece)
        query, key, value = self._normed_heads(whole, piece.vectors) if spec.qk_norm else (whole, "", "")
        past = [f"past.{index}.k", f"past.{index}.v"]
        rotary = [] if kind.rotary is None else list(self._tables(kind))
        inputs = [query, key, value, *past, "seqlens_k", self._count, *rotary]
        if self._bias:
            inputs = [*inputs, *[""] * (_BIAS_AT - len(inputs)), self._bias]
        types: dict[str, Any] = {} if window is None else {"sliding_window_cache": 1}
        if piece.cache is not None:
            scales = [w.constant(one.reshape(-1).astype(np.float32)) for one in (piece.cache.keys, piece.cache.values)]
            inputs = [*inputs, *[""] * (_SCALES_AT - len(inputs)), *scales]
            types |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
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
            scale = w.numbers(vectors[name], name)
            normed = w.op("SimplifiedLayerNormalization", [apart, scale], axis=-1, epsilon=epsilon)
            parts[at] = w.op("Reshape", [normed, w.constant(np.array([0, 0, heads * size], np.int64))])
        return parts[0], parts[1], parts[2]

    def _tables(self, kind: LayerKind) -> tuple[str, str]:
        if kind not in self._rotary:
            angles = np.outer(np.arange(self._context), self._layout.frequencies(self._spec, kind))
            self._rotary[kind] = self._w.numbers(np.cos(angles), "cosines"), self._w.numbers(np.sin(angles), "sines")
        return self._rotary[kind]

    def _probe(self, index: int, name: str, value: str) -> None:
        if self._probes:
            self._w.op("Identity", [value], [f"probe.{index}.{name}"])
            self._w.give(f"probe.{index}.{name}", _FLOAT, ["batch", "step", None])
