"""A decoder as a stateful model, in the form that optimum-intel exports and openvino-genai reads::

    input_ids [batch, step] int64        tokens that follow those in the states
    attention_mask [batch, total] int64  1 for each position, those in the states first
    position_ids [batch, step] int64
    beam_idx [batch] int32               the row of the states that each row goes on with
    → logits [batch, step, vocabulary] float32

Keys and values of each layer are states (ReadValue → Gather → Concat → Assign), which the CPU's plugin fuses with the
attention. A part of the layers has ``hidden`` [batch, step, channels] as input and output instead, and no states.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_targets.backends.openvino import library
from kedge_targets.backends.openvino.decoder.constants import Constants
from kedge_targets.decoder.layout import HeadLayout
from kedge_targets.decoder.matrix import Matrix
from kedge_targets.decoder.plan import Piece
from kedge_targets.decoder.spec import DecoderSpec, LayerKind

Array = npt.NDArray[Any]

HEAD_INPUT = "head_input"
"""Name of the node whose output is the head's input: a session cuts it to the positions that are asked for."""
WINDOWS, NO_WINDOWS = ["kedge", "windows"], "none"
"""Where a model says that no layer has a window, and how."""
_LOWEST = np.float32(np.finfo(np.float32).min)


class DecoderGraph:
    """Writes a decoder, or a part of its layers: the beginning, each layer in order, the end.

    Args:
        context: largest number of positions.
        probes: whether the inputs of each layer's matrices, keys and values are outputs too.
    """

    def __init__(self, spec: DecoderSpec, layout: HeadLayout, *, context: int, probes: bool = False) -> None:
        library.load()
        from openvino import opset13

        self._ops: Any = opset13
        self._c = Constants()
        self._spec = spec
        self._layout = layout
        self._context = context
        self._probes = probes
        self._inputs: dict[str, Any] = {}
        self._outputs: dict[str, Any] = {}
        self._assigned: list[Any] = []
        self._rotary: dict[LayerKind, tuple[Any, Any]] = {}
        self._masks: dict[int | None, Any] = {}
        self._hidden: Any = None
        self._embedding: Any = None

    def begin(self, embedding: Matrix | None, positions: Array | None = None) -> None:
        """Write the inputs and the embedding of tokens; ``embedding`` is None for a part that takes ``hidden``."""
        ops, spec = self._ops, self._spec
        if embedding is None:
            self._hidden = self._take("hidden", [-1, -1, spec.hidden], np.float32)
        else:
            tokens = self._take("input_ids", [-1, -1], np.int64)
            self._embedding = self._c.matrix(embedding)
            found = ops.gather(self._embedding, ops.convert(tokens, "i32"), self._c.integer(0))
            self._hidden = (
                found if spec.embedding_scale == 1 else ops.multiply(found, self._c.real(spec.embedding_scale))
            )
        self._take("attention_mask", [-1, -1], np.int64)
        places = self._take("position_ids", [-1, -1], np.int64)
        if embedding is not None:
            self._take("beam_idx", [-1], np.int32)
        if positions is not None:
            table = self._c.array(positions[: self._context].astype(np.float32))
            self._hidden = ops.add(self._hidden, ops.gather(table, places, self._c.integer(0)))

    def layer(self, index: int, piece: Piece) -> None:
        """Write one layer."""
        ops, m, v = self._ops, piece.matrices, piece.vectors
        normed = self._norm("attention_norm", self._hidden, v)
        self._probe("attention", normed)
        attended = self._attention(index, normed, piece)
        self._probe("o", attended)
        self._add("attention_post_norm", self._product(attended, m["o"], v.get("o.bias")), v)
        normed = self._norm("feed_forward_norm", self._hidden, v)
        self._probe("feed_forward", normed)
        inner = self._activated(
            self._product(
                normed, m["gate" if self._spec.gated else "up"], v.get("gate.bias" if self._spec.gated else "up.bias")
            )
        )
        if self._spec.gated:
            inner = ops.multiply(inner, self._product(normed, m["up"], v.get("up.bias")))
        self._probe("down", inner)
        self._add("feed_forward_post_norm", self._product(inner, m["down"], v.get("down.bias")), v)

    def end(self, norm: dict[str, Array] | None, head: Matrix | None, bias: Array | None = None) -> None:
        """Write norm and head. With ``head`` None the head is the embedding; with ``norm`` None the output is
        ``hidden`` itself."""
        ops = self._ops
        if norm is None:
            self._outputs["hidden_out"] = self._hidden
            return
        normed = self._norm("norm", self._hidden, norm)
        if self._spec.head_scale != 1:
            normed = ops.multiply(normed, self._c.real(self._spec.head_scale))
        normed.set_friendly_name(HEAD_INPUT)
        table = self._embedding if head is None else self._c.matrix(head)
        logits = ops.matmul(normed, table, False, True)
        self._outputs["logits"] = logits if bias is None else ops.add(logits, self._c.array(bias.astype(np.float32)))

    def model(self) -> Any:
        """Return the finished model."""
        openvino = library.load()
        results = []
        for name, node in self._outputs.items():
            node.output(0).get_tensor().set_names({name})
            results.append(self._ops.result(node))
        used = [one for one in self._inputs.values() if one.output(0).get_target_inputs()]
        made = openvino.Model(results, self._assigned, used, "decoder")
        # By themselves nodes are numbered through the whole process: equal decoders would be unlike files.
        for number, node in enumerate(made.get_ordered_ops()):
            if node.get_friendly_name() not in (HEAD_INPUT, *self._inputs):
                node.set_friendly_name(f"{node.get_type_name()}_{number}")
        return made

    def _take(self, name: str, shape: list[int], dtype: Any) -> Any:
        openvino = library.load()
        made = self._ops.parameter(openvino.PartialShape(shape), dtype, name=name)
        made.output(0).get_tensor().set_names({name})
        self._inputs[name] = made
        return made

    def _size(self, node: Any, axis: int) -> Any:
        return self._ops.gather(self._ops.shape_of(node, "i64"), self._c.integer(axis), self._c.integer(0))

    def _product(self, value: Any, matrix: Matrix, bias: Array | None = None) -> Any:
        found = self._ops.matmul(value, self._c.matrix(matrix), False, True)
        return found if bias is None else self._ops.add(found, self._c.array(bias.astype(np.float32)))

    def _add(self, post_name: str, out: Any, vectors: dict[str, Array]) -> None:
        """Add the output of a layer's part to the hidden state."""
        if self._spec.post_norms:
            out = self._norm(post_name, out, vectors)
        self._hidden = self._ops.add(self._hidden, out)

    def _norm(self, name: str, value: Any, vectors: dict[str, Array]) -> Any:
        ops, spec = self._ops, self._spec
        scale = self._c.array((vectors[name] + spec.norm_offset).astype(np.float32))
        if spec.norm == "layer":
            normed = ops.mvn(value, self._c.integers(-1), True, spec.norm_epsilon, "inside_sqrt")
            return ops.add(ops.multiply(normed, scale), self._c.array(vectors[f"{name}.bias"].astype(np.float32)))
        return self._root_mean_square(value, scale, spec.norm_epsilon)

    def _root_mean_square(self, value: Any, scale: Any, epsilon: float) -> Any:
        ops = self._ops
        squares = ops.reduce_mean(ops.power(value, self._c.real(2)), self._c.integers(-1), True)
        size = ops.sqrt(ops.add(squares, self._c.real(epsilon)))
        return ops.multiply(ops.multiply(value, ops.divide(self._c.real(1), size)), scale)

    def _activated(self, value: Any) -> Any:
        kind, ops = self._spec.activation, self._ops
        if kind == "silu":
            return ops.swish(value)
        if kind == "relu":
            return ops.relu(value)
        return ops.gelu(value, "tanh" if kind == "gelu_tanh" else "erf")

    def _attention(self, index: int, normed: Any, piece: Piece) -> Any:
        ops, spec, size, kind = self._ops, self._spec, self._layout.size, self._spec.layers[index]
        heads = {"q": spec.heads, "k": spec.kv_heads, "v": spec.kv_heads}
        parts: dict[str, Any] = {}
        for name, count in heads.items():
            flat = self._product(normed, piece.matrices[name], piece.vectors.get(f"{name}.bias"))
            apart = ops.reshape(flat, self._c.integers(0, 0, count, size), special_zero=True)
            if spec.qk_norm and name != "v":
                # Heads may hold channels that are always 0: their mean of squares is smaller by this.
                epsilon = spec.norm_epsilon * self._layout.norm_factor()
                scale = self._c.array(piece.vectors[f"{name}_norm"].astype(np.float32))
                apart = self._root_mean_square(apart, scale, epsilon)
            parts[name] = ops.transpose(apart, self._c.integers(0, 2, 1, 3))
        if kind.rotary is not None:
            tables = self._tables(kind)
            parts |= {name: self._turned(parts[name], tables) for name in "qk"}
        keys, values = (self._remembered(index, part, parts[part]) for part in "kv")
        if self._probes:
            self._outputs |= {"keys": keys, "values": values}
        attended = ops.scaled_dot_product_attention(
            parts["q"],
            self._repeated(keys),
            self._repeated(values),
            self._mask(kind.window),
            self._c.real(spec.attention_scale),
            causal=False,
        )
        joined = ops.transpose(attended, self._c.integers(0, 2, 1, 3))
        return ops.reshape(joined, self._c.integers(0, 0, spec.heads * size), special_zero=True)

    def _remembered(self, index: int, part: str, value: Any) -> Any:
        """Return keys or values of all positions, those of the state first, and keep them as its next value."""
        if "beam_idx" not in self._inputs:
            return value
        openvino, ops, spec = library.load(), self._ops, self._spec
        title = {"k": "key", "v": "value"}[part]
        name = f"past_key_values.{index}.{title}present.{index}.{title}"
        rest = self._c.integers(spec.kv_heads, 0, self._layout.size)
        rows = ops.unsqueeze(self._size(self._inputs["input_ids"], 0), self._c.integer(0))
        empty = ops.broadcast(self._c.real(0), ops.concat([rows, rest], 0))
        shape = openvino.PartialShape([-1, spec.kv_heads, -1, self._layout.size])
        state = ops.read_value(empty, name, np.float32, shape)
        past = ops.gather(state, self._inputs["beam_idx"], self._c.integer(0))
        whole = ops.concat([past, value], 2)
        self._assigned.append(ops.assign(whole, name))
        return whole

    def _repeated(self, value: Any) -> Any:
        """Return keys or values with one head for each of the queries'."""
        ops, spec = self._ops, self._spec
        times = spec.heads // spec.kv_heads
        if times == 1:
            return value
        # The fusion wants no other reader of the wide form: its sizes are taken from the narrow one.
        wide, shape = ops.unsqueeze(value, self._c.integer(2)), ops.shape_of(value, "i64")
        first = ops.gather(shape, self._c.integers(0, 1), self._c.integer(0))
        last = ops.gather(shape, self._c.integers(2, 3), self._c.integer(0))
        each = ops.concat([first, self._c.integers(times), last], 0)
        target = self._c.integers(0, spec.heads, -1, self._layout.size)
        return ops.reshape(ops.broadcast(wide, each, broadcast_spec="BIDIRECTIONAL"), target, special_zero=True)

    def _turned(self, value: Any, tables: tuple[Any, Any]) -> Any:
        ops, half = self._ops, self._layout.size // 2
        cosines, sines = tables
        halves = ops.variadic_split(value, self._c.integer(3), self._c.integers(half, half))
        first, second = (halves.output(at) for at in range(2))
        swapped = ops.concat([ops.multiply(second, self._c.real(-1)), first], -1)
        return ops.add(ops.multiply(value, cosines), ops.multiply(swapped, sines))

    def _tables(self, kind: LayerKind) -> tuple[Any, Any]:
        """Return cosines and sines of a step's positions, [batch, 1, step, size] each."""
        if kind not in self._rotary:
            ops = self._ops
            angles = np.outer(np.arange(self._context), self._layout.frequencies(self._spec, kind))
            whole = np.concatenate([angles, angles], axis=-1)
            places = ops.unsqueeze(self._inputs["position_ids"], self._c.integer(1))
            self._rotary[kind] = tuple(
                ops.gather(self._c.array(table.astype(np.float32)), places, self._c.integer(0))
                for table in (np.cos(whole), np.sin(whole))
            )
        return self._rotary[kind]

    def _mask(self, window: int | None) -> Any:
        """Return what is added to the scores, float32 [batch, 1, step, total]."""
        if window not in self._masks:
            ops = self._ops
            given = self._inputs["attention_mask"]
            total = self._size(given, 1)
            step = self._size(self._inputs.get("input_ids", self._inputs.get("hidden")), 1)
            columns = ops.range(self._c.integer(0), total, self._c.integer(1), "i64")
            rows = ops.unsqueeze(
                ops.range(ops.subtract(total, step), total, self._c.integer(1), "i64"), self._c.integer(1)
            )
            seen = ops.less_equal(columns, rows)
            if window is not None:
                seen = ops.logical_and(seen, ops.greater(columns, ops.subtract(rows, self._c.integer(window))))
            filled = ops.unsqueeze(ops.convert(given, "boolean"), self._c.integers(1, 2))
            self._masks[window] = ops.select(
                ops.logical_and(seen, filled), self._c.real(0), self._c.real(float(_LOWEST))
            )
        return self._masks[window]

    def _probe(self, name: str, value: Any) -> None:
        if self._probes:
            self._outputs[f"probe.{name}"] = value
