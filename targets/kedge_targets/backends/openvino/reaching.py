"""Lets ranges that NNCF found reach as far as more samples would (:mod:`kedge_targets.graph.unseen_ends`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
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
        one operator takes their tensors, stay equal. Ranges of single channels stay as they are."""
        groups: dict[tuple[float, float], list[Any]] = defaultdict(list)
        for node in model.get_ordered_ops():
            if node.get_type_name() == "FakeQuantize" and (found := _bounds(node)) is not None:
                groups[found].append(node)
        named = {id(node): self._tensor(node) for nodes in groups.values() for node in nodes}
        missing = {name for name in named.values() if name is not None} - self._seen.keys()
        if missing:
            self._seen |= ranges.histograms(self._given, self._calibration, sorted(missing), counts=False)
        for (low, high), nodes in groups.items():
            seen = [self._seen[name] for node in nodes if (name := named[id(node)]) is not None]
            ends = [one.ends.beyond(one.low, one.high) for one in seen]
            wide = min([low, *(end for end, _ in ends)]), max([high, *(end for _, end in ends)])
            if wide != (low, high):
                for node in nodes:
                    _set(node, *_whole(low, high, *wide))

    def _tensor(self, node: Any) -> str | None:
        names = sorted(node.input(0).get_source_output().get_names() & self._known)
        return names[0] if names else None


def _bounds(node: Any) -> tuple[float, float] | None:
    """Return (low, high) of an activation with one range of 256 levels."""
    sources = [node.input(index).get_source_output().get_node() for index in range(5)]
    if sources[0].get_type_name() == "Constant" or node.get_attributes().get("levels") != _LEVELS:
        return None
    if any(one.get_type_name() != "Constant" or one.data.size != 1 for one in sources[1:]):
        return None
    low, high = (float(one.data.reshape(-1)[0]) for one in sources[1:3])
    return low, high


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


def _set(node: Any, low: float, high: float) -> None:
    from openvino import opset13

    for index, value in ((1, low), (2, high), (3, low), (4, high)):
        old = node.input(index).get_source_output().get_node().data
        new = opset13.constant(np.full(old.shape, value, old.dtype))
        node.input(index).replace_source_output(new.output(0))
