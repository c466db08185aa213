"""Determines how many bits a quantized graph has, from its own nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kedge_targets.graph.wiring import Wiring

if TYPE_CHECKING:
    import onnx

_QUANTIZERS = frozenset({"Quant", "IntQuant", "BipolarQuant"})


def of(model: onnx.ModelProto) -> str:
    """Return ``w1a2``: the widest weight and the widest activation between two layers (excluding the input's own
    quantizer if there are others); empty if there is neither."""
    wiring = Wiring(model)
    constant = {tensor.name for tensor in model.graph.initializer}
    weights: list[int] = []
    activations: list[int] = []
    first: list[int] = []
    reached = False
    for node in model.graph.node:
        on_constants = all(name in constant for name in node.input if name)
        if on_constants:
            constant.update(node.output)
        elif node.op_type in ("Conv", "Gemm", "MatMul"):
            reached = True
        if node.op_type not in _QUANTIZERS:
            continue
        bits = 1 if node.op_type == "BipolarQuant" else wiring.constant(node.input[3])
        width = 1 if bits is None else int(bits if isinstance(bits, int) else bits.reshape(-1)[0])
        (weights if on_constants else activations if reached else first).append(width)
    if not weights:
        return ""
    return f"w{max(weights)}a{max(activations or first or [32])}"
