"""An encoder as a graph of ONNX Runtime's operators, for one source at a time::

input_ids [batch, source] int64               a text's tokens, or
input_features [batch, mels, frames] float32  a sound's log-mel features
→ cross.L.k, cross.L.v [batch, heads, source, head size] float32, the keys and values of each decoder layer L
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from kedge_targets.backends.onnxruntime.decoder.blocks import Blocks
from kedge_targets.backends.onnxruntime.decoder.writer import MICROSOFT, GraphWriter
from kedge_targets.decoder.contract import EncoderParts
from kedge_targets.decoder.plan import Piece
from kedge_targets.decoder.spec import DecoderSpec, EncoderSpec

Array = npt.NDArray[Any]

_FLOAT, _INT64 = TensorProto.FLOAT, TensorProto.INT64


class EncoderGraph(Blocks):
    """Writes an encoder: all of it, then the keys and values of each decoder layer.

    Args:
        spec: the decoder's.
    """

    def __init__(self, writer: GraphWriter, spec: DecoderSpec, encoder: EncoderSpec) -> None:
        super().__init__(writer, spec)
        self._encoder = encoder
        self._bias = ""
        self._out = ""

    def write(self, parts: EncoderParts) -> None:
        """Write the layers."""
        self._begin(parts)
        for index in range(self._encoder.layers):
            self._layer(f"encoder.{index}", parts.pieces(index))
        self._out = self._norm_of_sum("norm", parts.norm) if parts.norm else self._total()

    def _begin(self, parts: EncoderParts) -> None:
        w, one = self._w, self._encoder
        if parts.embedding is None:
            w.take("input_features", _FLOAT, ["batch", one.mels, 2 * one.context])
            self._hidden = self._heard(parts.convolutions)
        else:
            w.take("input_ids", _INT64, ["batch", "source"])
            self._hidden = self._embedded(parts.embedding)
        if parts.positions is not None:
            table = w.constant(parts.positions.astype(np.float32), "positions")
            self._hidden = w.op("Add", [self._hidden, self._first(table)])
        if parts.relative is not None:
            self._bias = self._biases(parts.relative)

    def _length(self) -> str:
        """Return the number of positions, int64 [1]."""
        return self._w.op("Shape", [self._hidden], start=1, end=2)

    def _first(self, table: str) -> str:
        """Return as many first rows of a table as there are positions."""
        w = self._w
        return w.op("Slice", [table, w.constant(np.array([0], np.int64)), self._length()])

    def _heard(self, weights: dict[str, Array]) -> str:
        w, value = self._w, "input_features"
        for name, stride in (("first", 1), ("second", 2)):
            inputs = [value, w.constant(weights[name], name), w.constant(weights[f"{name}.bias"], name)]
            made = w.op("Conv", inputs, kernel_shape=[3], strides=[stride], pads=[1, 1])
            value = self._activated(made)
        return w.op("Transpose", [value], perm=[0, 2, 1])

    def _biases(self, relative: Array) -> str:
        """Return the biases of all pairs of positions, float32 [1, heads, source, source]."""
        w, spec = self._w, self._spec
        if spec.relative is None:
            raise ValueError("biases without buckets")
        reach = self._encoder.context - 1
        buckets = spec.relative.of(np.arange(-reach, reach + 1), both_ways=True)
        table = w.constant(np.ascontiguousarray(relative[buckets].T.astype(np.float32)), "relative")
        zero, one = w.constant(np.array(0, np.int64)), w.constant(np.array(1, np.int64))
        length = w.op("Squeeze", [self._length()])
        places = w.op("Range", [zero, length, one])
        rows = w.op("Unsqueeze", [places, w.constant(np.array([1], np.int64))])
        apart = w.op("Add", [w.op("Sub", [places, rows]), w.constant(np.array(reach, np.int64))])
        return w.op("Unsqueeze", [w.op("Gather", [table, apart], axis=1), w.constant(np.array([0], np.int64))])

    def _layer(self, stem: str, piece: Piece) -> None:
        w, m, v = self._w, piece.matrices, piece.vectors
        attended = self._attention(stem, self._before("attention_norm", v), piece)
        self._after("attention_norm", "", w.product(attended, m["o"], f"{stem}.o", v.get("o.bias")), v)
        inner = self._inner(stem, self._before("feed_forward_norm", v), piece)
        self._after("feed_forward_norm", "", w.product(inner, m["down"], f"{stem}.down", v.get("down.bias")), v)

    def _attention(self, stem: str, normed: str, piece: Piece) -> str:
        w, one = self._w, self._encoder
        parts = [w.name(name) for name in "qkv"]
        w.op("Split", [self._queries_keys_values(stem, normed, piece)], parts, axis=-1, num_outputs=3)
        bias = ["", "", self._bias] if self._bias else []
        return w.op(
            "MultiHeadAttention",
            [*parts, *bias],
            domain=MICROSOFT,
            num_heads=one.heads,
            scale=float(one.attention_scale),
        )

    def keys_and_values(self, index: int, piece: Piece) -> None:
        """Write what one decoder layer attends to."""
        w, spec = self._w, self._spec
        for part in "kv":
            name = f"cross_{part}"
            made = w.product(self._out, piece.matrices[name], f"{index}.{name}", piece.vectors.get(f"{name}.bias"))
            shape = w.constant(np.array([0, 0, spec.heads, spec.head_size], np.int64))
            w.op("Transpose", [w.op("Reshape", [made, shape])], [f"cross.{index}.{part}"], perm=[0, 2, 1, 3])
            w.give(f"cross.{index}.{part}", _FLOAT, ["batch", spec.heads, "source", spec.head_size])
