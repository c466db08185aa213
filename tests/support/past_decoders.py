"""A small decoder as an ONNX graph with explicit past and present, in the forms that a parser may take or not."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

HEADS, KV_HEADS, SIZE, HIDDEN, INNER, VOCABULARY, CONTEXT, LAYERS = 4, 2, 16, 64, 96, 128, 64, 2
_GROUP = 32
_HALF = TensorProto.FLOAT16


class PastDecoder:
    """A Llama of random float16 weights.

    Args:
        attention: ``plain`` (MatMul, Softmax), or ``Attention`` (the operator of opset 23, with past and present).
        coded: whether the layers' weights are codes of 4 bits in groups, with a DequantizeLinear.
    """

    def __init__(self, attention: str = "plain", *, coded: bool = False) -> None:
        self._attention = attention
        self._coded = coded
        self._random = np.random.default_rng(0)
        self._nodes: list[Any] = []
        self._constants: list[Any] = []
        self._opset = 23 if attention == "Attention" else 21

    def model(self) -> onnx.ModelProto:
        """The graph."""
        taken = [("input_ids", TensorProto.INT64, [1, "step"]), ("position_ids", TensorProto.INT64, [1, "step"])]
        taken.append(("mask", _HALF, [1, 1, "step", "total"]))
        given: list[tuple[str, int, list[Any]]] = [("logits", _HALF, [1, "step", VOCABULARY])]
        angles = np.outer(np.arange(CONTEXT), 1e4 ** (-np.arange(SIZE // 2) / (SIZE // 2)))
        tables = [self._constant(np.tile(function(angles), 2)) for function in (np.cos, np.sin)]
        self._turns = [self._op("Unsqueeze", self._op("Gather", one, "position_ids"), self._whole(1)) for one in tables]
        hidden = self._op("Gather", self._constant(self._random.normal(0, 0.5, (VOCABULARY, HIDDEN))), "input_ids")
        for layer in range(LAYERS):
            for part in ("key", "value"):
                taken.append((f"past_key_values.{layer}.{part}", _HALF, [1, KV_HEADS, "past", SIZE]))
                given.append((f"present.{layer}.{part}", _HALF, [1, KV_HEADS, "total", SIZE]))
            hidden = self._op("Add", hidden, self._attended(layer, self._normed(hidden)))
            normed = self._normed(hidden)
            gate = self._product(normed, HIDDEN, INNER)
            inner = self._op(
                "Mul", self._op("Mul", gate, self._op("Sigmoid", gate)), self._product(normed, HIDDEN, INNER)
            )
            hidden = self._op("Add", hidden, self._product(inner, INNER, HIDDEN))
        self._op("MatMul", self._normed(hidden), self._constant(self._normal(HIDDEN, VOCABULARY)), outputs=["logits"])
        inputs, outputs = ([helper.make_tensor_value_info(*one) for one in listed] for listed in (taken, given))
        graph = helper.make_graph(self._nodes, "decoder", inputs, outputs, self._constants)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self._opset)], ir_version=10)
        onnx.checker.check_model(made)
        return made

    def _attended(self, layer: int, normed: str) -> str:
        parts = {}
        for name, heads in (("query", HEADS), ("key", KV_HEADS), ("value", KV_HEADS)):
            apart = self._op("Reshape", self._product(normed, HIDDEN, heads * SIZE), self._whole(0, 0, heads, SIZE))
            turned = self._op("Transpose", apart, perm=[0, 2, 1, 3])
            parts[name] = turned if name == "value" else self._turned(turned)
        past = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
        present = [f"present.{layer}.{part}" for part in ("key", "value")]
        if self._attention == "Attention":
            found = self._op(
                "Attention", *parts.values(), "mask", *past, outputs=[f"attended.{layer}", *present], scale=SIZE**-0.5
            )
        else:
            keys, values = (
                self._op("Unsqueeze", self._op("Concat", before, parts[part], outputs=[after], axis=2), self._whole(2))
                for before, after, part in zip(past, present, ("key", "value"), strict=True)
            )
            # A row for each head of keys: none of them is repeated.
            query = self._op("Reshape", parts["query"], self._whole(1, KV_HEADS, HEADS // KV_HEADS, -1, SIZE))
            scores = self._op("MatMul", query, self._op("Transpose", keys, perm=[0, 1, 2, 4, 3]))
            scores = self._op("Mul", scores, self._constant(np.array(SIZE**-0.5)))
            scores = self._op("Add", scores, self._op("Unsqueeze", "mask", self._whole(1)))
            found = self._op("MatMul", self._op("Softmax", scores, axis=-1), values)
            found = self._op("Reshape", found, self._whole(1, HEADS, -1, SIZE))
        joined = self._op("Reshape", self._op("Transpose", found, perm=[0, 2, 1, 3]), self._whole(0, 0, HEADS * SIZE))
        return self._product(joined, HEADS * SIZE, HIDDEN)

    def _turned(self, value: str) -> str:
        cosines, sines = self._turns
        first = self._op("Slice", value, self._whole(0), self._whole(SIZE // 2), self._whole(3))
        second = self._op("Slice", value, self._whole(SIZE // 2), self._whole(SIZE), self._whole(3))
        swapped = self._op("Concat", self._op("Neg", second), first, axis=3)
        return self._op("Add", self._op("Mul", value, cosines), self._op("Mul", swapped, sines))

    def _normed(self, value: str) -> str:
        wide = self._op("Cast", value, to=TensorProto.FLOAT)
        squares = self._op("ReduceMean", self._op("Mul", wide, wide), self._whole(-1), keepdims=1)
        small = self._name("epsilon")
        self._constants.append(numpy_helper.from_array(np.array(1e-5, np.float32), small))
        size = self._op("Sqrt", self._op("Add", squares, small))
        return self._op("Cast", self._op("Div", wide, size), to=_HALF)

    def _product(self, value: str, rows: int, columns: int) -> str:
        if not self._coded:
            return self._op("MatMul", value, self._constant(self._normal(rows, columns)))
        codes = self._random.integers(-8, 8, rows * columns)
        name = self._name("codes")
        raw = ((codes[0::2] & 15) | ((codes[1::2] & 15) << 4)).astype(np.uint8).tobytes()
        stored = onnx.TensorProto(name=name, data_type=TensorProto.INT4, dims=[rows, columns], raw_data=raw)
        self._constants.append(stored)
        scales = self._constant(np.full((rows // _GROUP, columns), 0.01))
        return self._op("MatMul", value, self._op("DequantizeLinear", name, scales, axis=0, block_size=_GROUP))

    def _normal(self, *shape: int) -> np.ndarray:
        return self._random.normal(0, 0.1, shape)

    def _name(self, stem: str) -> str:
        return f"{stem}.{len(self._nodes)}.{len(self._constants)}"

    def _constant(self, array: np.ndarray) -> str:
        name = self._name("constant")
        self._constants.append(numpy_helper.from_array(np.asarray(array, np.float16), name))
        return name

    def _whole(self, *values: int) -> str:
        name = self._name("whole")
        self._constants.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def _op(self, kind: str, *inputs: str, outputs: list[str] | None = None, **attributes: Any) -> str:
        named = outputs or [self._name(kind)]
        self._nodes.append(helper.make_node(kind, list(inputs), named, self._name(f"node.{kind}"), **attributes))
        return named[0]
