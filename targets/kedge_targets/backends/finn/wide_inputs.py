"""Moves a 16-bit input quantizer, for which the fabric would need 65535 thresholds, to the processor, which quantizes
the input as for other integer files; the fabric receives integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kedge_targets.backends.finn import graph_preparation
from kedge_targets.graph.wiring import Wiring

if TYPE_CHECKING:
    import onnx

_BITS = 16
"""Bits of the integer types to which a processor clips natively."""


@dataclass(frozen=True)
class WideInput:
    """What the processor does with the input before the fabric.

    Attributes:
        node: name of the removed quantizer.
        scale: scale of the integers.
        signed: whether there are negative integers.
    """

    node: str
    scale: float
    signed: bool

    @property
    def datatype(self) -> str:
        """Return FINN's name of the integer type."""
        return f"INT{_BITS}" if self.signed else f"UINT{_BITS}"

    @property
    def dtype(self) -> str:
        """Return numpy's name of the integer type."""
        return self.datatype.lower()

    @property
    def note(self) -> str:
        """Return a note for the user."""
        return f"the input is quantized to {_BITS} bits on the processor ({self.node}), not in the fabric"


def taken_out(model: onnx.ModelProto) -> WideInput | None:
    """Replace the input's quantizer by its scale, in place. Return None unless a 16-bit quantizer with one scale, no
    zero-point and the usual rounding is the only reader of the only input."""
    from onnx import helper

    wiring = Wiring(model)
    given = [value.name for value in model.graph.input if wiring.is_input(value.name)]
    readers = wiring.readers.get(given[0], []) if len(given) == 1 else []
    if len(readers) != 1 or readers[0][1] != 0 or readers[0][0].op_type not in ("Quant", "IntQuant"):
        return None
    node = readers[0][0]
    numbers = [wiring.constant(name) for name in node.input[1:4]]
    flags = graph_preparation.attributes_of(node)
    if any(number is None or np.size(number) != 1 for number in numbers):
        return None
    scale, zero, bits = (float(np.reshape(number, -1)[0]) for number in numbers if number is not None)
    usual = flags.get("rounding_mode", b"ROUND").decode().upper() == "ROUND" and not flags.get("narrow", 0)
    if bits != _BITS or zero != 0 or scale <= 0 or not usual:
        return None
    at = list(model.graph.node).index(node)
    model.graph.node.remove(node)
    model.graph.node.insert(at, helper.make_node("Mul", [given[0], node.input[1]], [node.output[0]], name=node.name))
    return WideInput(node.name, scale, bool(flags.get("signed", 1)))
