"""The two ends of a graph: from the inputs to its first layers, and from its last layers to the outputs. They have few
weights and wide ranges.

Rounded in the middle of a graph an error is one of many; in the first layers, whose maps are large and whose channels
differ most, and in what makes boxes and scores of the last ones, it is the whole picture's. They hold a hundredth of
the weights, so in float they cost nothing. A single first layer in float gains nothing, its answer is rounded all the
same: the float part has to reach from an end to where ranges are even.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kedge_targets.graph import dead_code, layers, qdq_placement
from kedge_targets.graph.wiring import Wiring

if TYPE_CHECKING:
    import onnx

SHARES = (0.005, 0.01, 0.02, 0.04)
"""Largest share of all weights in either end."""


def ends(model: onnx.ModelProto) -> list[tuple[str, ...]]:
    """Return sets of nodes at both ends of the graph, from small to large; empty if there is nothing to choose.

    Args:
        model: its nodes have names, its tensors have types.
    """
    wiring = Wiring(model)
    weights = {layer.name: layer.size for layer in layers.layers(model, wiring) if layer.weight is not None}
    total = sum(weights.values())
    if len(weights) < 3 or not total:
        return []
    nodes = list(model.graph.node)
    before = {
        node.name: [wiring.maker[tensor].name for tensor in dead_code.inputs_of(node) if tensor in wiring.maker]
        for node in nodes
    }
    behind: dict[str, list[str]] = {node.name: [] for node in nodes}
    for name, makers in before.items():
        for maker in makers:
            behind[maker].append(name)
    order = [node.name for node in nodes]
    depth, height = _distances(order, before, weights), _distances(order[::-1], behind, weights)
    floats = qdq_placement.floats(model)
    numbers = {node.name for node in nodes if any(tensor in floats for tensor in node.output)}
    found: list[tuple[str, ...]] = []
    for share in SHARES:
        first, last = (_level(distance, weights, share * total) for distance in (depth, height))
        chosen = tuple(name for name in order if name in numbers and (0 < depth[name] <= first or height[name] <= last))
        if chosen not in found and not weights.keys().isdisjoint(chosen):
            found.append(chosen)
    return found


def _distances(
    order: Sequence[str], sources: Mapping[str, Sequence[str]], weights: Mapping[str, int]
) -> dict[str, int]:
    """Return the number of layers with weights on the longest path from an end to each node, itself included."""
    found: dict[str, int] = {}
    for name in order:
        found[name] = max((found[source] for source in sources[name]), default=0) + (name in weights)
    return found


def _level(distance: Mapping[str, int], weights: Mapping[str, int], room: float) -> int:
    """Return the largest distance within which the layers stay within the share of weights."""
    level = held = 0
    while level < max(distance.values()):
        held += sum(size for name, size in weights.items() if distance[name] == level + 1)
        if held > room:
            break
        level += 1
    return level
