"""Finds activation functions that are flat far below zero (SiLU, Mish, GELU, Hardswish, ELU), whose inputs need no
resolution there.

A convolution in front of a SiLU gives -140 to 140, and all below -6 becomes nothing. Rounded over its whole range its
steps are wider than the bend of the SiLU; rounded from where the SiLU begins to answer, they are half as wide or less,
at no cost. YOLO-like detectors lose most of their detections without this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge_targets.graph.wiring import Wiring

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]
Gate = Callable[[Array], Array]

_SHARE = 1 / 3
"""Share of a step by which the output of clipped values may differ. Rounding itself differs by at most half a step."""
_PLACES = 1024


def gates(model: onnx.ModelProto) -> dict[str, tuple[Gate, ...]]:
    """Return tensors that only such activations read, each with the functions of its readers."""
    wiring = Wiring(model)
    found = {}
    for tensor, readers in list(wiring.readers.items()):
        if tensor in wiring.outputs or wiring.constant(tensor) is not None:
            continue
        nodes = list({id(node): node for node, _ in readers}.values())
        functions = [_own(node) for node in nodes]
        if all(one is not None for one in functions):
            found[tensor] = tuple(one for one in functions if one is not None)
        elif (gated := _gated(tensor, nodes, wiring)) is not None:
            found[tensor] = (gated,)
    return found


def least(low: float, high: float, functions: tuple[Gate, ...], *, levels: int) -> float:
    """Return the highest start of the range below which no activation's output changes by more than a share of a step.

    Args:
        low, high: what was seen, low ≤ 0 ≤ high.
        levels: steps that the range is divided into.
    """
    if low >= 0.0:
        return low
    places = np.linspace(low, 0.0, _PLACES)
    steps = (high - places) / levels
    fits = np.ones(_PLACES, dtype=bool)
    for function in functions:
        answers = function(places)
        most, fewest = np.maximum.accumulate(answers), np.minimum.accumulate(answers)
        fits &= np.maximum(most - answers, answers - fewest) <= _SHARE * steps
    # Beyond the first place that does not fit lies the bend.
    end = int(np.argmin(fits)) if not fits.all() else _PLACES
    return float(places[max(0, end - 1)])


def _own(node: onnx.NodeProto) -> Gate | None:
    """Return the function of one node."""
    if node.domain not in ("", "ai.onnx"):
        return None
    alpha = next((attribute.f for attribute in node.attribute if attribute.name == "alpha"), 1.0)
    if node.op_type == "Elu":
        return lambda x: np.where(x < 0, alpha * np.expm1(np.minimum(x, 0)), x)
    if node.op_type == "Swish":
        return lambda x: x * _sigmoid(alpha * x)
    # GELU's curve lies within 0.02 of this one, and is as flat.
    known: dict[str, Gate] = {"HardSwish": _hardswish, "Mish": _mish, "Gelu": lambda x: x * _sigmoid(1.702 * x)}
    return known.get(node.op_type)


def _gated(tensor: str, nodes: list[onnx.NodeProto], wiring: Wiring) -> Gate | None:
    """Return the function if the tensor is multiplied by a function of itself, such as Mul(x, Sigmoid(x))."""
    product = next((node for node in nodes if node.op_type == "Mul"), None)
    first = next((node for node in nodes if node.op_type in ("Sigmoid", "HardSigmoid", "Softplus")), None)
    if len(nodes) != 2 or product is None or first is None:
        return None
    gate, function = first, _silu if first.op_type == "Sigmoid" else _hard(first)
    if first.op_type == "Softplus":
        after = _only_reader(first.output[0], wiring)
        if after is None or after.op_type != "Tanh":
            return None
        gate, function = after, _mish
    alone = _only_reader(gate.output[0], wiring) is product
    return function if alone and set(product.input) == {tensor, gate.output[0]} else None


def _only_reader(tensor: str, wiring: Wiring) -> onnx.NodeProto | None:
    readers = wiring.readers[tensor]
    return readers[0][0] if len(readers) == 1 and tensor not in wiring.outputs else None


def _hard(node: onnx.NodeProto) -> Gate:
    given = {attribute.name: attribute.f for attribute in node.attribute}
    alpha, beta = given.get("alpha", 0.2), given.get("beta", 0.5)
    return lambda x: x * np.clip(alpha * x + beta, 0, 1)


def _sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-np.clip(x, -80, 80))))


def _silu(x: Array) -> Array:
    return x * _sigmoid(x)


def _hardswish(x: Array) -> Array:
    return x * np.clip(x / 6 + 0.5, 0, 1)


def _mish(x: Array) -> Array:
    return x * np.tanh(np.logaddexp(0, x))
