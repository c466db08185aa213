"""Counts the weights and multiply-accumulates of a ``.tflite`` by number format."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kedge_targets.true_precision import Numbers

_WEIGHT_AT = {
    "CONV_2D": 1, "DEPTHWISE_CONV_2D": 1, "FULLY_CONNECTED": 1, "TRANSPOSE_CONV": 1, "CONV_3D": 1, "BATCH_MATMUL": 1,
}  # fmt: skip
"""Multiply-accumulate operators → the index of their second factor."""
_RECURRENT = ("UNIDIRECTIONAL_SEQUENCE_LSTM", "LSTM", "UNIDIRECTIONAL_SEQUENCE_RNN", "RNN")
_LARGE = 1024
_SMALL_INTEGERS = ("int8", "uint8", "int4", "int16")


def numbers(file: Path) -> Numbers:
    """Count the weights and multiply-accumulates; see :func:`kedge_targets.graph.counting.numbers`. A ``.tflite`` has
    all its shapes."""
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(file.read_bytes(), 0))
    kinds = {value: name for name, value in vars(schema.TensorType).items() if not name.startswith("_")}
    operators = {value: name for name, value in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
    made = [_Subgraph(one, model, kinds, operators) for one in model.subgraphs]
    sizes: dict[str, int] = {}
    for one in made:
        for kind, size in one.weights():
            sizes[kind] = sizes.get(kind, 0) + size
    counts = [one.macs() for one in made]
    return Numbers(
        weight_bytes=dict(sorted(sizes.items())),
        macs=sum(count for count, _ in counts),
        integer_macs=sum(integers for _, integers in counts),
        rounds=any(one.rounds() for one in made),
    )


class _Subgraph:
    def __init__(self, graph: Any, model: Any, kinds: dict[int, str], operators: dict[int, str]) -> None:
        self._tensors = graph.tensors
        self._buffers = model.buffers
        self._kinds = kinds
        self._steps = []
        for step in graph.operators or ():
            code = model.operatorCodes[step.opcodeIndex]
            name = operators.get(max(code.builtinCode, code.deprecatedBuiltinCode), "")
            self._steps.append((name, list(step.inputs), list(step.outputs)))
        self._made = {index for _, _, outputs in self._steps for index in outputs}

    def weights(self) -> list[tuple[str, int]]:
        """Return dtype and bytes of each constant that a layer multiplies, and of each other large one."""
        used = set()
        for name, inputs, _ in self._steps:
            if name in _WEIGHT_AT:
                used |= {self._source(inputs[index]) for index in (0, _WEIGHT_AT[name])}
            elif name in _RECURRENT:
                used |= set(inputs[1:9])
        found = []
        for index in range(len(self._tensors)):
            shape, kind = self._shape(index), self._kind(index)
            if not self._constant(index) or kind in ("int32", "int64", "bool") or len(shape) < 2:
                continue
            if index in used or _product(shape) >= _LARGE:
                bits = 4 if kind == "int4" else int("".join(filter(str.isdigit, kind)) or 8)
                found.append((kind, -(-_product(shape) * bits // 8)))
        return found

    def macs(self) -> tuple[int, int]:
        """Return all multiply-accumulates, and those whose factors are both integers."""
        whole = integers = 0
        for name, inputs, outputs in self._steps:
            count = self._multiplications(name, inputs, outputs)
            whole += count
            if name in _WEIGHT_AT and self._in_integers(inputs[2 if name == "TRANSPOSE_CONV" else 0], inputs[1]):
                integers += count
        return whole, integers

    def rounds(self) -> bool:
        """Return whether any tensor is quantized."""
        return any(
            tensor.quantization is not None and tensor.quantization.scale is not None and len(tensor.quantization.scale)
            for tensor in self._tensors
        )

    def _in_integers(self, activation: int, weight: int) -> bool:
        """Return whether both factors are integers. If a float activation meets an integer weight, the kernel finds the
        range in each call."""
        return self._kind(activation) in (*_SMALL_INTEGERS, "float32") and self._kind(weight) in _SMALL_INTEGERS

    def _multiplications(self, name: str, inputs: list[int], outputs: list[int]) -> int:
        if name in _RECURRENT:
            weights = sum(_product(self._shape(index)) for index in inputs[1:9] if index >= 0)
            return _product((weights, *self._shape(inputs[0])[1:-1]))
        if name not in _WEIGHT_AT:
            return 0
        factor, made = self._shape(inputs[1]), self._shape(outputs[0])
        if name == "TRANSPOSE_CONV":
            return _product((*self._shape(inputs[2])[:-1], *factor))
        if name == "BATCH_MATMUL":
            return _product((*made, *self._shape(inputs[0])[-1:]))
        return _product((*made[:-1], *factor))

    def _source(self, index: int) -> int:
        """Return the tensor from which this one is dequantized (float16 weights are stored behind DEQUANTIZE)."""
        for name, inputs, outputs in self._steps:
            if name == "DEQUANTIZE" and outputs[0] == index:
                return int(inputs[0])
        return index

    def _constant(self, index: int) -> bool:
        data = self._buffers[self._tensors[index].buffer].data
        return index not in self._made and data is not None and len(data) > 0

    def _shape(self, index: int) -> tuple[int, ...]:
        shape = self._tensors[index].shape
        return () if shape is None else tuple(int(dim) for dim in shape)

    def _kind(self, index: int) -> str:
        return self._kinds.get(self._tensors[index].type, "").lower()


def _product(dims: Sequence[int]) -> int:
    return math.prod(max(1, int(dim)) for dim in dims)
