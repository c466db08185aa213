"""Restores the float graph of a file that is already quantized."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge_targets.graph import dead_code, integer_operators, ranges
from kedge_targets.graph.wiring import Wiring

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]

TAKEN = "the model was quantized already: its weights are taken as they are"

_LOOKED_AT = 32
"""Samples on which a file is asked what its pairs cut off."""
_FAR, _STEP = 0.05, 1 / 255
"""Shares of a pair's range; what lies farther beyond was cut off on purpose, and not by chance of the samples."""


def restored(
    model: onnx.ModelProto, calibration: Iterable[Mapping[str, Array]] = ()
) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """Return the model in float, and a note; the given model if it is not quantized. Weights are dequantized,
    activations are no longer rounded. Clipping stays: quantizers drop a Relu or Clip if the ends of integers do its
    work.

    Args:
        calibration: shows where values lie far beyond a pair's range, so that the pair clips them; without samples
            each pair counts as clipping.

    Raises:
        UnsupportedOperatorError: see :func:`kedge_targets.graph.integer_operators.in_pairs`.
    """
    given, model = model, integer_operators.in_pairs(model)
    if not any(node.op_type == "DequantizeLinear" for node in model.graph.node):
        return model, () if model is given else (TAKEN,)
    import onnx

    given, model = model, onnx.ModelProto()
    model.CopyFrom(given)
    wiring = Wiring(model)
    clipping = _clipping(given, wiring, list(itertools.islice(calibration, _LOOKED_AT)))
    kept: list[onnx.NodeProto] = []
    for node in given.graph.node:
        made = _instead(node, wiring, model, clipping)
        kept += [node] if made is None else made
    del model.graph.node[:]
    model.graph.node.extend(kept)
    dead_code.remove_dead_nodes(model)
    return model, (TAKEN,)


def _clipping(model: onnx.ModelProto, wiring: Wiring, samples: list[Mapping[str, Array]]) -> set[str]:
    """Return the activations whose pair does the work of a Relu or Clip."""
    found = own_ranges(model)
    seen = ranges.histograms(model, samples, list(found), counts=False) if samples and found else {}
    clipped = set()
    for name, (low, high) in found.items():
        width = high - low
        # 0 is an end by intention: beyond it is what lies a step below.
        below = _STEP * width if low == 0 else _FAR * width
        if name in seen:
            beyond = seen[name].low < low - below or seen[name].high > high + _FAR * width
        else:
            beyond = low != 0 or not wiring.never_negative(name)
        if beyond:
            clipped.add(name)
    return clipped


def own_ranges(model: onnx.ModelProto) -> dict[str, tuple[float, float]]:
    """Return activation → range that its pair represents, for a file that is already quantized."""
    wiring = Wiring(model)
    found = {}
    for node in model.graph.node:
        down = wiring.maker.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if down is None or down.op_type != "QuantizeLinear" or wiring.constant(node.input[1]) is None:
            continue
        low, high = _bounds(node, wiring)
        if wiring.constant(down.input[0]) is None and np.isfinite([low, high]).all():
            found[down.input[0]] = (low, high)
    return found


def _instead(
    node: onnx.NodeProto, wiring: Wiring, model: onnx.ModelProto, clipping: set[str]
) -> list[onnx.NodeProto] | None:
    """Return the replacement of a DequantizeLinear; None for other nodes."""
    from onnx import helper, numpy_helper

    if node.op_type != "DequantizeLinear" or wiring.constant(node.input[1]) is None:
        return None
    value = wiring.constant(node.input[0])
    if value is not None:
        model.graph.initializer.append(numpy_helper.from_array(_values(value, node, wiring), node.output[0]))
        return []

    def stored(what: str, number: float) -> str:
        name = f"{node.output[0]}_{what}"
        model.graph.initializer.append(numpy_helper.from_array(np.array(number, np.float32), name))
        return name

    down = wiring.maker.get(node.input[0])
    if down is None and wiring.is_input(node.input[0]):
        return _from_input(node, wiring, stored)
    if down is None or down.op_type != "QuantizeLinear" or wiring.constant(down.input[1]) is None:
        return None
    if down.input[0] in clipping:
        ends = [stored(*end) for end in zip(("low", "high"), _bounds(node, wiring), strict=True)]
        return [helper.make_node("Clip", [down.input[0], *ends], [node.output[0]], name=node.name)]
    return [helper.make_node("Identity", [down.input[0]], [node.output[0]], name=node.name)]


def _from_input(
    node: onnx.NodeProto, wiring: Wiring, stored: Callable[[str, float], str]
) -> list[onnx.NodeProto] | None:
    """Read integers back that the model is given."""
    from onnx import helper

    step, zero = _parameters(node, wiring)
    if step.size != 1 or zero.size != 1:
        return None
    answer = node.output[0]
    between = [f"{answer}_number", f"{answer}_difference"]
    scales = stored("zero", float(zero.reshape(-1)[0])), stored("step", float(step.reshape(-1)[0]))
    return [
        helper.make_node("Cast", [node.input[0]], between[:1], name=f"{node.name}_number", to=1),
        helper.make_node("Sub", [between[0], scales[0]], between[1:], name=f"{node.name}_difference"),
        helper.make_node("Mul", [between[1], scales[1]], [answer], name=node.name),
    ]


def _values(value: Array, node: onnx.NodeProto, wiring: Wiring) -> Array:
    scale, zero = _parameters(node, wiring)
    how = {item.name: int(item.i) for item in node.attribute}
    axis = how.get("axis", 1)
    if block := how.get("block_size", 0):  # one scale for so many along the axis, the last block may be shorter
        whole = np.arange(value.shape[axis]) // block
        scale, zero = np.take(scale, whole, axis), np.take(zero, whole, axis) if zero.ndim else zero
    elif scale.ndim == 1 and scale.size > 1:
        shape = [1] * value.ndim
        shape[axis] = -1
        scale, zero = scale.reshape(shape), zero.reshape(shape) if zero.ndim else zero
    return np.asarray((value.astype(np.float64) - zero) * scale, np.float32)


def _bounds(node: onnx.NodeProto, wiring: Wiring) -> tuple[float, float]:
    """Return the range that the pair's integers represent."""
    scale, _ = _parameters(node, wiring)
    zero = wiring.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros((), np.uint8)
    if zero is None or scale.size != 1 or zero.dtype.kind not in "iu":
        return -np.inf, np.inf
    info = np.iinfo(zero.dtype)
    at, step = float(zero.reshape(-1)[0]), float(scale.reshape(-1)[0])
    return (info.min - at) * step, (info.max - at) * step


def _parameters(node: onnx.NodeProto, wiring: Wiring) -> tuple[Array, Array]:
    scale = wiring.constant(node.input[1])
    zero = wiring.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    return np.asarray(scale, np.float64), np.asarray(0.0 if zero is None else zero, np.float64)
