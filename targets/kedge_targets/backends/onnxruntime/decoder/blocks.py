"""The parts that the layers of decoders and encoders have in common: norms, feed-forward networks, embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_targets.backends.onnxruntime.decoder.writer import MICROSOFT, GraphWriter
from kedge_targets.decoder.matrix import Codes, Matrix, stacked
from kedge_targets.decoder.plan import Piece
from kedge_targets.decoder.spec import DecoderSpec

Array = npt.NDArray[Any]


class Blocks:
    """Writes a stack of layers into a :class:`GraphWriter`.

    Args:
        spec: says which norms, activation and gates there are.
    """

    def __init__(self, writer: GraphWriter, spec: DecoderSpec) -> None:
        self._w = writer
        self._spec = spec
        self._hidden = ""
        self._added = ""
        """The tensor still to be added to the hidden state; the next norm does both in one operator."""
        self._shared: tuple[Codes, tuple[str, str, str]] | None = None
        self._embedding = ""

    def _embedded(self, embedding: Matrix, tokens: str = "input_ids") -> str:
        """Add the embedding of tokens, times its scale, and return its name."""
        w, scale = self._w, self._spec.embedding_scale
        found = self._looked_up(embedding, tokens)
        return found if scale == 1 else w.op("Mul", [found, w.numbers(np.array(scale))])

    def _looked_up(self, embedding: Matrix, tokens: str) -> str:
        w = self._w
        if isinstance(embedding, Codes):
            names = w.codes(embedding, "embedding")
            self._shared = (embedding, names)
            flat = embedding.shape[1] * embedding.bits // 8
            table = w.op("Reshape", [names[0], w.constant(np.array([embedding.shape[0], flat], np.int64))])
            inputs = [table, tokens, names[1], *([names[2]] if names[2] else [])]
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
        found = w.op("Gather", [stored, tokens])
        self._embedding = w.computed(stored, embedding)
        return w.computed(found, embedding)

    def _before(self, name: str, vectors: dict[str, Array]) -> str:
        """Return the input of a layer's next part: the norm of the sum so far, or the sum if norms come last."""
        return self._hidden if self._spec.norm_last else self._norm_of_sum(name, vectors)

    def _after(self, name: str, post_name: str, out: str, vectors: dict[str, Array]) -> None:
        """Add a part's output to the hidden state."""
        self._added = self._norm(post_name, out, vectors) if self._spec.post_norms else out
        if self._spec.norm_last:
            self._hidden = self._norm_of_sum(name, vectors)

    def _inner(self, stem: str, normed: str, piece: Piece) -> str:
        w, m, v = self._w, piece.matrices, piece.vectors
        if not self._spec.gated:
            return self._activated(w.product(normed, m["up"], f"{stem}.up", v.get("up.bias")))
        biases = [v[name] for name in ("gate.bias", "up.bias") if name in v]
        bias = np.concatenate(biases) if biases else None
        both = w.product(normed, stacked([m["gate"], m["up"]]), f"{stem}.gate_up", bias)
        gate, up = w.name("gate"), w.name("up")
        w.op("Split", [both], [gate, up], axis=-1, num_outputs=2)
        return w.op("Mul", [self._activated(gate), up])

    def _activated(self, value: str) -> str:
        kind = self._spec.activation
        if kind == "silu":
            # x * sigmoid(alpha x) with alpha 1 is SiLU, in one node.
            return self._w.op("QuickGelu", [value], domain=MICROSOFT, alpha=1.0)
        if kind == "relu":
            return self._w.op("Relu", [value])
        return self._w.op("Gelu", [value], approximate="tanh" if kind == "gelu_tanh" else "none")

    def _queries_keys_values(self, stem: str, normed: str, piece: Piece) -> str:
        """Add the projection to queries, keys and values, side by side, and return its name."""
        matrices = [piece.matrices[name] for name in "qkv"]
        biases = [piece.vectors.get(f"{name}.bias") for name in "qkv"]
        bias = None
        if any(one is not None for one in biases):
            zeros = [np.zeros(matrix.shape[0], np.float32) for matrix in matrices]
            bias = np.concatenate([zero if one is None else one for one, zero in zip(biases, zeros, strict=True)])
        return self._w.product(normed, stacked(matrices), f"{stem}.qkv", bias)

    def _norm(self, name: str, value: str, vectors: dict[str, Array]) -> str:
        w, spec = self._w, self._spec
        scale = w.numbers(vectors[name] + spec.norm_offset, name)
        if spec.norm == "rms":
            return w.op("SimplifiedLayerNormalization", [value, scale], axis=-1, epsilon=spec.norm_epsilon)
        bias = w.numbers(vectors[f"{name}.bias"], name)
        return w.op("LayerNormalization", [value, scale, bias], axis=-1, epsilon=spec.norm_epsilon)

    def _norm_of_sum(self, name: str, vectors: dict[str, Array]) -> str:
        """Add the pending tensor to the hidden state, normalize the sum, and return the name of the result."""
        w, spec = self._w, self._spec
        if not self._added:
            return self._norm(name, self._hidden, vectors)
        inputs = [self._hidden, self._added, w.numbers(vectors[name] + spec.norm_offset, name)]
        kind = "SkipSimplifiedLayerNormalization"
        if spec.norm == "layer":
            kind = "SkipLayerNormalization"
            inputs.append(w.numbers(vectors[f"{name}.bias"], name))
        normed, total = w.name("normed"), w.name("sum")
        w.op(kind, inputs, [normed, "", "", total], domain=MICROSOFT, epsilon=spec.norm_epsilon)
        self._hidden, self._added = total, ""
        return normed

    def _total(self) -> str:
        """Return the hidden state with what is still to be added."""
        if self._added:
            self._hidden, self._added = self._w.op("Add", [self._hidden, self._added]), ""
        return self._hidden
