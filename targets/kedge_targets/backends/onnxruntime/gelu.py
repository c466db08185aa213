"""Switches GELU to its tanh form if its result is quantized directly; ONNX Runtime computes that form in two thirds of
the time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kedge_targets.graph.wiring import Wiring

if TYPE_CHECKING:
    import onnx

ERROR = 4.8e-4
"""Largest error of the tanh form (Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016)."""
_SHARE = 0.125
"""Allowed error as a share of a step; rounding itself is off by half a step."""


def by_tanh(model: onnx.ModelProto) -> None:
    """Give each Gelu the tanh form, in place, if it is quantized to steps of which the error is a small part."""
    from onnx import helper

    wiring = Wiring(model)
    for node in model.graph.node:
        if node.op_type != "Gelu" or node.domain not in ("", "ai.onnx") or node.output[0] in wiring.outputs:
            continue
        steps = [
            step
            for reader, index in wiring.readers[node.output[0]]
            if reader.op_type == "QuantizeLinear" and index == 0
            and (step := wiring.constant(reader.input[1])) is not None
        ]  # fmt: skip
        if steps and all(step.min() * _SHARE >= ERROR for step in steps):
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("approximate", "tanh"))
