"""Emulates, on a CPU, a device that keeps fewer bits between layers than float32 has."""

from __future__ import annotations

from typing import Any

import numpy as np

FLOAT32_BITS = 24
"""Bits of float32's significand, including the hidden one."""
HALF_BITS = 11
"""Bits of FP16's significand, including the hidden one."""

_HALF_MAX = float(np.finfo(np.float16).max)


def round_layers(model: Any, bits: int) -> None:
    """Round each layer's result to this many bits, within FP16's range, in place; inputs and outputs keep their order.

    Uses Dekker's splitting: with ``c = x (2**s + 1)``, ``c - (c - x)`` is ``x`` rounded to ``24 - s`` bits (T. J.
    Dekker, A floating-point technique for extending the available precision, 1971).
    """
    from openvino import opset1

    factor = np.float32(2 ** (FLOAT32_BITS - bits) + 1)
    for operation in model.get_ordered_ops():
        if operation.get_type_name() in ("Constant", "Result", "Convert") or _is_constant(operation):
            continue
        for output in operation.outputs():
            if str(output.get_element_type().get_type_name()) != "f32":
                continue
            consumers = list(output.get_target_inputs())
            inside = opset1.clamp(output, -_HALF_MAX, _HALF_MAX)
            large = opset1.multiply(inside, opset1.constant(factor))
            rounded = opset1.subtract(large, opset1.subtract(large, inside))
            for consumer in consumers:
                consumer.replace_source_output(rounded.output(0))
    model.validate_nodes_and_infer_types()


def _is_constant(operation: Any) -> bool:
    return all(value.get_node().get_type_name() in ("Constant", "Convert") for value in operation.input_values()) and (
        operation.get_input_size() > 0
    )
