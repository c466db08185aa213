"""GELU whose answer is rounded to integers at once: by its tanh form, which ONNX Runtime computes in two thirds of the
time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kedge_targets.graph.wiring import Wiring

if TYPE_CHECKING:
    import onnx

ERROR = 4.8e-4
"""By which the tanh form (Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016) is off at most."""
_SHARE = 0.125
"""Of a step: rounding itself is off by half of one."""


def by_tanh(model: onnx.ModelProto) -> None:
    """Give each Gelu the tanh form, in place, where some reader rounds to steps that its error is a small part of."""
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
