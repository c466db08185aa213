"""Follows every channel through a graph, node by node."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from kedge.pruning import shapes
from kedge.pruning.axis_rules import RULES
from kedge.pruning.channel_ids import Axes, none
from kedge.pruning.rule_scope import Scope, attribute, integers
from kedge.pruning.shape_constants import sliced

if TYPE_CHECKING:
    import onnx

# ONNX Runtime's own operators that mean what the rules of that name say.
_CONTRIBUTED = frozenset({"Gelu", "FastGelu", "QuickGelu", "BiasGelu", "SimplifiedLayerNormalization"})


def follow_channels(model: onnx.ModelProto, example: shapes.Example | None = None) -> Scope:
    """Follow the channels of a graph whose constants are folded.

    Args:
        example: see :func:`kedge.pruning.shapes.observed`.

    Raises:
        UnsupportedOperatorError, ModelError: ONNX Runtime does not load the graph.
    """
    from kedge_targets.graph import nodes

    scope = Scope(model, shapes.observed(model, example))
    for node in model.graph.node:
        _lengths_carried(node, scope)
        made = _applied(node, scope)
        if made is None:
            scope.hold(*filter(None, node.input))
            made = [none(scope.rank(name)) for name in node.output]
        for name, axes in zip(node.output, made, strict=False):
            if name:
                scope.axes[name] = _fitting(scope, name, axes)
    for inner in list(nodes.graphs(model.graph))[1:]:
        # What an inner graph takes from outside.
        scope.hold(*(name for node in inner.node for name in node.input if name in scope.axes))
    scope.hold(*(value.name for value in (*model.graph.input, *model.graph.output)))
    return scope


def _applied(node: onnx.NodeProto, scope: Scope) -> list[Axes] | None:
    """Return what the outputs carry; None if there is no rule for the node."""
    if node.op_type == "Shape" and node.domain in ("", "ai.onnx"):
        return [none(1)]
    standard = node.domain in ("", "ai.onnx") or (node.domain == "com.microsoft" and node.op_type in _CONTRIBUTED)
    rule = RULES.get(node.op_type) if standard else None
    if rule is None or not all(scope.known(name) for name in (*node.input, *node.output) if name):
        return None
    return rule(node, scope)


def _fitting(scope: Scope, name: str, axes: Axes) -> Axes:
    """Return the axes without those whose lengths do not fit, which are held: a safeguard against wrong rules."""
    lengths = scope.shapes.lengths.get(name, ())
    if len(lengths) != len(axes):
        scope.tracker.hold(*axes)
        return none(len(lengths))
    kept = []
    for ids, (one, other) in zip(axes, lengths, strict=True):
        fits = ids is None or (len(ids) > 0 and one % len(ids) == 0 and other % len(ids) == 0)
        if not fits:
            scope.tracker.hold(ids)
        kept.append(ids if fits else None)
    return tuple(kept)


def _lengths_carried(node: onnx.NodeProto, scope: Scope) -> None:
    """Follow the lengths of axes through shape vectors. An axis whose length goes anywhere but into the target of
    another shape is held, since its length would mean something else after a cut."""
    if node.op_type == "Shape" and node.domain in ("", "ai.onnx"):
        axes = scope.of(node.input[0])
        scope.dims[node.output[0]] = axes[attribute(node, "start", 0) : attribute(node, "end", len(axes))]
        return
    carried = [index for index, name in enumerate(node.input) if name in scope.dims]
    if not carried:
        return
    if node.op_type in ("Reshape", "Expand") and carried == [1]:
        return
    rule = _VECTORS.get(node.op_type)
    made = rule(node, scope) if rule is not None else None
    if made is None:
        scope.hold(*(node.input[index] for index in carried))
    else:
        scope.dims[node.output[0]] = made


def _same(node: onnx.NodeProto, scope: Scope) -> Axes | None:
    return scope.dims.get(node.input[0])


def _cast(node: onnx.NodeProto, scope: Scope) -> Axes | None:
    import onnx

    whole = attribute(node, "to") in (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
    return scope.dims.get(node.input[0]) if whole else None


def _picked(node: onnx.NodeProto, scope: Scope) -> Axes | None:
    indices, entries = scope.constant(node, 1), scope.dims.get(node.input[0])
    if indices is None or entries is None:
        return None
    return tuple(entries[int(index)] for index in np.ravel(indices))


def _cut(node: onnx.NodeProto, scope: Scope) -> Axes | None:
    entries, bounds = scope.dims.get(node.input[0]), sliced(scope, node)
    if entries is None or bounds is None or 0 not in bounds:
        return None
    start, stop, step = bounds[0]
    return entries[start:stop:step] if step else None


def _joined(node: onnx.NodeProto, scope: Scope) -> Axes | None:
    made: Axes = ()
    for name in node.input:
        size = scope.shapes.fixed(name, 0) if scope.rank(name) == 1 else None
        if name not in scope.dims and size is None:
            return None
        made += scope.dims[name] if name in scope.dims else none(size or 0)
    return made


def _reshaped(node: onnx.NodeProto, scope: Scope) -> Axes | None:
    """Handle a scalar reshaped to a vector of one, and the reverse."""
    return scope.dims.get(node.input[0]) if integers(scope.constant(node, 1)) in ([-1], [1], []) else None


_VECTORS: dict[str, Callable[[onnx.NodeProto, Scope], Axes | None]] = {
    "Identity": _same,
    "Squeeze": _same,
    "Unsqueeze": _same,
    "Cast": _cast,
    "Gather": _picked,
    "Slice": _cut,
    "Concat": _joined,
    "Reshape": _reshaped,
}
