"""Fuses GELU as exporters spell it out: TFLite has the whole function, but no Erf."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

DOMAIN = "com.microsoft"
"""Domain in which ONNX Runtime has Gelu for any opset; ONNX itself has it only from opset 20 on."""

_NEAR = 1e-4


def fuse(model: onnx.ModelProto) -> None:
    """Replace each ``x * (1 + erf(x / sqrt(2))) / 2`` (with its factors in any order) by one Gelu, in place, and ONNX's
    own Gelu by the same, since onnx2tf (1.28) builds that of operators that TFLite does not have."""
    import onnx

    for node in model.graph.node:
        if node.op_type == "Gelu" and node.domain in ("", "ai.onnx") and _exact(node):
            node.domain = DOMAIN
            del node.attribute[:]
    graph = _Graph(model)
    for erf in [node for node in model.graph.node if node.op_type == "Erf"]:
        found = graph.gelu_around(erf)
        if found is None:
            continue
        source, last = found
        whole = onnx.helper.make_node("Gelu", [source], list(last.output), name=erf.name, domain=DOMAIN)
        index = list(model.graph.node).index(last)
        model.graph.node.remove(last)
        model.graph.node.insert(index, whole)
        graph = _Graph(model)
    if any(node.domain == DOMAIN for node in model.graph.node):
        _drop_unused(model)
        if all(opset.domain != DOMAIN for opset in model.opset_import):
            model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))


def _exact(node: onnx.NodeProto) -> bool:
    return all(one.name != "approximate" or one.s == b"none" for one in node.attribute)


class _Graph:
    """The producers and readers of each tensor, and the values of scalar constants."""

    def __init__(self, model: onnx.ModelProto) -> None:
        import onnx

        self._maker: dict[str, onnx.NodeProto] = {}
        self._takers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in model.graph.node:
            for name in node.output:
                self._maker[name] = node
            for name in node.input:
                self._takers[name].append(node)
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                tensors[node.output[0]] = node.attribute[0].t
        self._scalars = {
            name: float(onnx.numpy_helper.to_array(tensor).reshape(-1)[0])
            for name, tensor in tensors.items()
            if math.prod(tensor.dims) == 1 and tensor.data_type == onnx.TensorProto.FLOAT
        }

    def gelu_around(self, erf: onnx.NodeProto) -> tuple[str, onnx.NodeProto] | None:
        """Return the input and the last node of the GELU that ``erf`` belongs to."""
        source = self._scaled(erf.input[0])
        added = self._only_taker(erf.output[0], "Add")
        if source is None or added is None or not self._is(self._other(added, erf.output[0]), 1.0):
            return None
        node, wanted = added, {"half", "source"}
        while wanted:
            product = self._only_taker(node.output[0], "Mul")
            if product is None:
                return None
            seen = self._factors(self._other(product, node.output[0]), source)
            if not seen or not seen <= wanted:
                return None
            wanted -= seen
            node = product
        return source, node

    def _scaled(self, name: str) -> str | None:
        """Return ``x`` if ``name`` is ``x / sqrt(2)``."""
        maker = self._maker.get(name)
        if maker is None or maker.op_type not in ("Div", "Mul"):
            return None
        if maker.op_type == "Div":
            return str(maker.input[0]) if self._is(maker.input[1], math.sqrt(2)) else None
        for index in (0, 1):
            if self._is(maker.input[index], math.sqrt(0.5)):
                return str(maker.input[1 - index])
        return None

    def _factors(self, name: str, source: str) -> set[str]:
        if name == source:
            return {"source"}
        if self._is(name, 0.5):
            return {"half"}
        maker = self._maker.get(name)
        if maker is not None and maker.op_type == "Mul":
            parts = [self._factors(part, source) for part in maker.input if part == source or self._is(part, 0.5)]
            return set().union(*parts) if len(parts) == 2 else set()
        return set()

    def _only_taker(self, name: str, operator: str) -> onnx.NodeProto | None:
        takers = self._takers[name]
        return takers[0] if len(takers) == 1 and takers[0].op_type == operator else None

    def _other(self, node: onnx.NodeProto, name: str) -> str:
        return str(node.input[1] if node.input[0] == name else node.input[0])

    def _is(self, name: str, value: float) -> bool:
        return abs(self._scalars.get(name, math.inf) - value) < _NEAR


def _drop_unused(model: onnx.ModelProto) -> None:
    """Remove nodes whose outputs nothing reads."""
    while True:
        used = {name for node in model.graph.node for name in node.input} | {out.name for out in model.graph.output}
        dead = [node for node in model.graph.node if not used & set(node.output)]
        if not dead:
            return
        for node in dead:
            model.graph.node.remove(node)
