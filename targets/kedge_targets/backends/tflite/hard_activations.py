"""Rewrites HardSwish and HardSigmoid with a Clip from 0 to 6, which TFLite has as an operator and fuses into
HARD_SWISH. onnx2tf (1.28) writes a Clip from 0 to 1, to which TensorFlow's quantizer gives the steps of its other
factor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kedge_targets.graph.names import Names

if TYPE_CHECKING:
    import onnx


def spell_out(model: onnx.ModelProto) -> None:
    """Replace each of them, in place. The last node keeps the original's name and output."""
    from onnx import helper, numpy_helper

    names = Names(model)
    made: list[onnx.NodeProto] = []

    def stored(node: onnx.NodeProto, what: str, value: float) -> str:
        name = names.fresh(f"{node.output[0]}_{what}")
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value, np.float32), name))
        return name

    def add(node: onnx.NodeProto, operator: str, inputs: list[str], answer: str = "") -> str:
        answer = answer or names.fresh(f"{node.output[0]}_{operator.lower()}")
        name = node.name if answer == node.output[0] else names.fresh_node(answer)
        made.append(helper.make_node(operator, inputs, [answer], name=name))
        return answer

    for node in model.graph.node:
        if node.op_type not in ("HardSwish", "HardSigmoid") or node.domain not in ("", "ai.onnx"):
            made.append(node)
            continue
        given: dict[str, Any] = {item.name: item.f for item in node.attribute}
        swish = node.op_type == "HardSwish"
        alpha, beta = (1 / 6, 0.5) if swish else (given.get("alpha", 0.2), given.get("beta", 0.5))
        x = node.input[0]
        if abs(6 * alpha - 1) > 1e-5:
            x = add(node, "Mul", [x, stored(node, "slope", 6 * alpha)])
        x = add(node, "Add", [x, stored(node, "shift", 6 * beta)])
        x = add(node, "Clip", [x, stored(node, "low", 0.0), stored(node, "high", 6.0)])
        x = add(node, "Mul", [node.input[0], x]) if swish else x
        add(node, "Mul", [x, stored(node, "sixth", 1 / 6)], node.output[0])
    del model.graph.node[:]
    model.graph.node.extend(made)
