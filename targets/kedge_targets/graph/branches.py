"""Finds what decides which branch of a graph runs, and how often a loop does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from kedge_targets.graph import nodes

if TYPE_CHECKING:
    import onnx

_SHAPES = frozenset({"Shape", "Size"})


def deciding(model: onnx.ModelProto) -> list[str]:
    """Return the names of the main graph's nodes that compute the conditions of If and Loop, of those within others
    too, in graph order, without what only gives them a shape. Rounded, they let another branch run wherever a number
    lies near its threshold, and the answer is another one, not a less accurate one."""
    every, found = _deciding(model)
    return [every[place].name for place in found if place < len(model.graph.node)]


def deciding_within(model: onnx.ModelProto) -> list[str]:
    """Return the same of the graphs within the main graph. A node without a name is named by its first output."""
    every, found = _deciding(model)
    within = (every[place] for place in found if place >= len(model.graph.node))
    return [node.name or node.output[0] for node in within]


def _deciding(model: onnx.ModelProto) -> tuple[list[onnx.NodeProto], list[int]]:
    """Return all nodes, those of the main graph first, and the places of those that decide."""
    every = [node for graph in nodes.graphs(model.graph) for node in graph.node]
    makers: dict[str, list[int]] = defaultdict(list)  # branches of one If may use a name twice
    sources: dict[str, list[str]] = defaultdict(list)
    pending: list[str] = []
    for place, node in enumerate(every):
        bodies = nodes.bodies(node)
        if node.op_type == "If":
            pending.append(node.input[0])
        elif node.op_type == "Loop":
            pending += [*node.input[:2], bodies[0].output[0].name]
        for tensor in node.output if not bodies and node.op_type not in _SHAPES else ():
            makers[tensor].append(place)
        for tensor, whence in _flow(node, bodies):
            sources[tensor] += whence
    found: set[int] = set()
    known = {""}
    while pending:
        tensor = pending.pop()
        if tensor not in known:
            known.add(tensor)
            found.update(makers[tensor])
            pending += sources[tensor]
    return every, sorted(found)


def _flow(node: onnx.NodeProto, bodies: Sequence[onnx.GraphProto]) -> Iterator[tuple[str, list[str]]]:
    """Yield the tensors that a node gives, to its graphs too, each with the tensors it comes from."""
    given, made = list(node.input), list(node.output)
    if not bodies:
        yield from ((tensor, given) for tensor in made if node.op_type not in _SHAPES)
        return
    inner = [[value.name for value in body.output] for body in bodies]
    if node.op_type == "If":
        yield from ((tensor, [names[place] for names in inner]) for place, tensor in enumerate(made))
        return
    (body, *_), (answers, *_) = bodies, inner
    taken = [value.name for value in body.input]
    loop = node.op_type == "Loop"  # its body takes the number of the turn first, and gives the condition first
    scanned = next((one.i for one in node.attribute if one.name == "num_scan_inputs"), len(given))
    carried = len(given) - (2 if loop else scanned)
    yield from ((tensor, [answers[place + loop]]) for place, tensor in enumerate(made))
    yield from ((name, [source]) for name, source in zip(taken, given, strict=False))
    yield from ((taken[place + 2 * loop], [answers[place + loop]]) for place in range(carried))


def note(names: Sequence[str]) -> tuple[str, ...]:
    """Return a note on such nodes; none if there are none."""
    if not names:
        return ()
    listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    why = "they decide which branch of an If runs, or how often a Loop does"
    return (f"{len(names)} nodes stay in float ({listed}): {why}",)
