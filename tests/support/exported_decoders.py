"""A small random decoder as others export it to ONNX: past and present are inputs and outputs of plain operators."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.support import decoders

HEADS, SIZE, LAYERS, CONTEXT = 2, 16, 2, 64
_HIDDEN = HEADS * SIZE
_FLOAT, _INT64 = TensorProto.FLOAT, TensorProto.INT64


def folder(path: Path, *, inner: int = 48, beside: bool = False) -> Path:
    """Write ``model.onnx`` with tokenizer and configuration beside it; return the file.

    Args:
        beside: whether its weights lie in a file of their own.
    """
    path.mkdir(parents=True, exist_ok=True)
    decoders.tokenizer(path)
    config = {"model_type": "gpt2", "n_positions": CONTEXT, "eos_token_id": 2, "bos_token_id": 1}
    (path / "config.json").write_text(json.dumps(config))
    model = _Graph(inner).model()
    onnx.checker.check_model(model)
    onnx.save_model(model, str(path / "model.onnx"), save_as_external_data=beside, location="model.onnx_data")
    return path / "model.onnx"


class _Graph:
    def __init__(self, inner: int) -> None:
        self._random = np.random.default_rng(4)
        self._nodes: list[Any] = []
        self._constants: list[Any] = []
        self._inner = inner

    def _op(self, kind: str, inputs: list[str], outputs: list[str] | None = None, **attributes: Any) -> str:
        named = outputs or [f"{kind}.{len(self._nodes)}"]
        self._nodes.append(helper.make_node(kind, inputs, named, f"n{len(self._nodes)}", **attributes))
        return named[0]

    def _constant(self, array: Any) -> str:
        name = f"c{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def _weight(self, *shape: int) -> str:
        return self._constant(self._random.normal(0, 0.25, shape).astype(np.float32))

    def _norm(self, x: str) -> str:
        scale = self._constant(np.ones(_HIDDEN, np.float32))
        return self._op("LayerNormalization", [x, scale], axis=-1)

    def _heads(self, x: str) -> str:
        made = self._op("MatMul", [x, self._weight(_HIDDEN, _HIDDEN)])
        split = self._op("Reshape", [made, self._constant(np.array([0, 0, HEADS, SIZE], np.int64))])
        return self._op("Transpose", [split], perm=[0, 2, 1, 3])

    def _hidden_places(self) -> str:
        """Minus a large number where a key comes after its query or is masked: [batch, 1, step, total]."""
        one = self._constant(np.array([1], np.int64))
        total = self._op("Squeeze", [self._op("Shape", ["attention_mask"], start=1, end=2)])
        keys = self._op("Range", [self._constant(np.array(0, np.int64)), total, self._constant(np.array(1, np.int64))])
        queries = self._op("Unsqueeze", ["position_ids", self._constant(np.array([2], np.int64))])
        later = self._op("Greater", [keys, queries])
        masked = self._op("Unsqueeze", [self._op("Equal", ["attention_mask", self._constant(np.int64(0))]), one])
        either = self._op("Or", [later, masked])
        large, none = self._constant(np.float32(-1e9)), self._constant(np.float32(0))
        return self._op("Unsqueeze", [self._op("Where", [either, large, none]), one])

    def model(self) -> Any:
        table = self._weight(decoders.VOCABULARY, _HIDDEN)
        x = self._op("Gather", [table, "input_ids"])
        x = self._op("Add", [x, self._op("Gather", [self._weight(CONTEXT, _HIDDEN), "position_ids"])])
        away = self._hidden_places()
        for layer in range(LAYERS):
            x = self._op("Add", [x, self._attention(layer, self._norm(x), away)])
            up = self._op("MatMul", [self._norm(x), self._weight(_HIDDEN, self._inner)])
            down = self._op("MatMul", [self._op("Relu", [up]), self._weight(self._inner, _HIDDEN)])
            x = self._op("Add", [x, down])
        self._op("MatMul", [self._norm(x), self._weight(_HIDDEN, decoders.VOCABULARY)], ["logits"])
        value = helper.make_tensor_value_info
        inputs = [
            value("input_ids", _INT64, ["batch", "step"]),
            value("attention_mask", _INT64, ["batch", "total"]),
            value("position_ids", _INT64, ["batch", "step"]),
        ]
        outputs = [value("logits", _FLOAT, ["batch", "step", decoders.VOCABULARY])]
        for layer in range(LAYERS):
            for part in ("key", "value"):
                name = f"past_key_values.{layer}.{part}"
                inputs.append(value(name, _FLOAT, ["batch", HEADS, "past", SIZE]))
                outputs.append(value(f"present.{layer}.{part}", _FLOAT, ["batch", HEADS, "total", SIZE]))
        graph = helper.make_graph(self._nodes, "decoder", inputs, outputs, self._constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)

    def _attention(self, layer: int, x: str, away: str) -> str:
        q = self._heads(x)
        both = []
        for part in ("key", "value"):
            past, present = f"past_key_values.{layer}.{part}", f"present.{layer}.{part}"
            both.append(self._op("Concat", [past, self._heads(x)], [present], axis=2))
        turned = self._op("Transpose", [both[0]], perm=[0, 1, 3, 2])
        scores = self._op("Mul", [self._op("MatMul", [q, turned]), self._constant(np.float32(SIZE**-0.5))])
        shares = self._op("Softmax", [self._op("Add", [scores, away])], axis=-1)
        joined = self._op("Transpose", [self._op("MatMul", [shares, both[1]])], perm=[0, 2, 1, 3])
        flat = self._op("Reshape", [joined, self._constant(np.array([0, 0, _HIDDEN], np.int64))])
        return self._op("MatMul", [flat, self._weight(_HIDDEN, _HIDDEN)])
