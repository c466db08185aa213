"""Lets ranges that NNCF found reach as far as more samples would (:mod:`kedge_targets.graph.unseen_ends`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge_targets.graph import ranges

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]

_LEVELS = 256
_SYMMETRIC = 0.02  # by which the ends' sizes differ at most where the zero-point is the middle


class Reaching:
    """What calibration saw of a graph's tensors, observed once.

    Args:
        given: the float graph, whose tensors' names OpenVINO keeps.
    """

    def __init__(self, given: onnx.ModelProto, calibration: Iterable[Mapping[str, Array]]) -> None:
        self._given, self._calibration = given, calibration
        self._known = {value.name for value in given.graph.input}
        self._known |= {tensor for node in given.graph.node for tensor in node.output if tensor}
        self._seen: dict[str, ranges.Histogram] = {}

    def extend(self, model: Any) -> None:
        """Move the ends of the model's activation ranges outwards, in place. Ranges that NNCF made equal, because
        one operator takes their tensors, stay equal. Those of single channels grow by the same share as the tensor's.
        """
        groups: dict[tuple[tuple[float, ...], tuple[float, ...]], list[Any]] = defaultdict(list)
        for node in model.get_ordered_ops():
            if node.get_type_name() == "FakeQuantize" and (found := _bounds(node)) is not None:
                groups[found].append(node)
        named = {id(node): self._tensor(node) for nodes in groups.values() for node in nodes}
        missing = {name for name in named.values() if name is not None} - self._seen.keys()
        if missing:
            self._seen |= ranges.histograms(self._given, self._calibration, sorted(missing), counts=False)
        for bounds, nodes in groups.items():
            low, high = np.array(bounds)
            seen = [self._seen[name] for node in nodes if (name := named[id(node)]) is not None]
            wide = _of_channels(low, high, seen) if low.size > 1 else _of_all(low, high, seen)
            if not np.array_equal(wide, (low, high)):
                whole = np.array([_whole(*one) for one in zip(low, high, *wide, strict=True)])
                for node in nodes:
                    _set(node, whole[:, 0], whole[:, 1])

    def _tensor(self, node: Any) -> str | None:
        names = sorted(node.input(0).get_source_output().get_names() & self._known)
        return names[0] if names else None


def _bounds(node: Any) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return (low, high) of an activation in 256 levels: one number each, or one for each channel."""
    sources = [node.input(index).get_source_output().get_node() for index in range(5)]
    if sources[0].get_type_name() == "Constant" or node.get_attributes().get("levels") != _LEVELS:
        return None
    if any(one.get_type_name() != "Constant" for one in sources[1:]):
        return None
    low, high = (tuple(map(float, np.ravel(one.data))) for one in sources[1:3])
    return (low, high) if len(low) == len(high) else None


def _of_all(low: Array, high: Array, seen: Sequence[ranges.Histogram]) -> tuple[Array, Array]:
    """Return the range that all of these need."""
    for one in seen:
        lowest, highest = one.ends.beyond(one.low, one.high)
        low, high = np.minimum(low, lowest), np.maximum(high, highest)
    return low, high


def _of_channels(low: Array, high: Array, seen: Sequence[ranges.Histogram]) -> tuple[Array, Array]:
    ends = [(one, *one.ends.beyond(one.low, one.high)) for one in seen]
    down = max((end / one.low for one, end, _ in ends if one.low < 0), default=1.0)
    up = max((end / one.high for one, _, end in ends if one.high > 0), default=1.0)
    return np.where(low < 0, low * down, low), np.where(high > 0, high * up, high)


def _whole(low: float, high: float, lowest: float, highest: float) -> tuple[float, float]:
    """Return the wider range as NNCF would make it: 0 lies on a level, and the middle stays the middle."""
    if low >= 0.0:
        return low, highest
    if abs(high + low) <= _SYMMETRIC * high:
        factor = max(lowest / low, highest / high)
        return low * factor, high * factor
    most = _LEVELS - 1
    zero = min(max(1, round(-lowest * most / (highest - lowest))), most - 1)
    step = max(-lowest / zero, highest / (most - zero))
    return -zero * step, (most - zero) * step


def _set(node: Any, low: Array, high: Array) -> None:
    from openvino import opset13

    for index, value in ((1, low), (2, high), (3, low), (4, high)):
        old = node.input(index).get_source_output().get_node().data
        new = opset13.constant(value.reshape(old.shape).astype(old.dtype))
        node.input(index).replace_source_output(new.output(0))
