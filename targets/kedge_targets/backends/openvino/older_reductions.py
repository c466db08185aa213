"""Writes reductions whose axes OpenVINO's reader (2026.4) overlooks as others.

Until opset 17 the axes are an attribute. Of ReduceL1, ReduceLogSum and ReduceLogSumExp the reader takes none, and
reduces over all axes, that of the batch too."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kedge_targets.graph import nodes, opsets
from kedge_targets.graph.names import Names

if TYPE_CHECKING:
    import onnx

_OVERLOOKED = frozenset({"ReduceL1", "ReduceLogSum", "ReduceLogSumExp"})
_AS_INPUT = 18
"""First opset in which these take their axes as an input."""
_SUM_AS_INPUT = 13
"""First one in which ReduceSum and Squeeze do."""


def with_axes_of_onnx(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which these are written by ReduceSum and ReduceMax; the given model if it has none."""
    if opsets.version(model) >= _AS_INPUT or not any(_is_overlooked(node) for node in model.graph.node):
        return model
    import onnx

    made = onnx.ModelProto()
    made.CopyFrom(model)
    writing = _Writing(made)
    for node in model.graph.node:
        writing.write(node)
    del made.graph.node[:]
    made.graph.node.extend(writing.written)
    return made


def _is_overlooked(node: onnx.NodeProto) -> bool:
    given = any(attribute.name == "axes" for attribute in node.attribute)
    return node.op_type in _OVERLOOKED and node.domain in ("", nodes.DEFAULT_DOMAIN) and given


class _Writing:
    """The nodes that are written so far."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.written: list[onnx.NodeProto] = []
        self._model = model
        self._names = Names(model)
        self._by_input = opsets.version(model) >= _SUM_AS_INPUT

    def write(self, node: onnx.NodeProto) -> None:
        """Write a node; the last of those that replace one has its name."""
        from onnx import helper

        if not _is_overlooked(node):
            self.written.append(node)
            return
        how = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        axes, keep, given, answer = list(how["axes"]), int(how.get("keepdims", 1)), node.input[0], node.output[0]
        if node.op_type == "ReduceL1":
            self._add("Abs", [given], magnitude := self._fresh(answer))
            self._over("ReduceSum", magnitude, axes, answer, name=node.name, keepdims=keep)
            return
        if node.op_type == "ReduceLogSum":
            self._over("ReduceSum", given, axes, total := self._fresh(answer), keepdims=keep)
            self._add("Log", [total], answer, name=node.name)
            return
        # The largest is taken out before Exp, which would overflow.
        largest, rest, power, total, log = (self._fresh(answer) for _ in range(5))
        self._add("ReduceMax", [given], largest, axes=axes, keepdims=1)
        self._add("Sub", [given, largest], rest)
        self._add("Exp", [rest], power)
        self._over("ReduceSum", power, axes, total, keepdims=keep)
        self._add("Log", [total], log)
        if not keep:
            self._over("Squeeze", largest, axes, narrow := self._fresh(answer))
            largest = narrow
        self._add("Add", [log, largest], answer, name=node.name)

    def _fresh(self, base: str) -> str:
        return self._names.fresh(f"{base}_part")

    def _over(self, operator: str, given: str, axes: list[int], answer: str, *, name: str = "", **more: int) -> None:
        from onnx import numpy_helper

        if not self._by_input:
            self._add(operator, [given], answer, name=name, axes=axes, **more)
            return
        stored = self._names.fresh(f"{answer}_axes")
        self._model.graph.initializer.append(numpy_helper.from_array(np.array(axes, np.int64), stored))
        self._add(operator, [given, stored], answer, name=name, **more)

    def _add(self, operator: str, given: list[str], answer: str, *, name: str = "", **more: int | list[int]) -> None:
        from onnx import helper

        name = name or self._names.fresh_node(answer)
        self.written.append(helper.make_node(operator, given, [answer], name=name, **more))
