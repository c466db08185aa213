"""Constants in a graph that give the length of an axis: targets of Reshape and Expand, bounds of Slice."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kedge.pruning.channel_ids import Ids, same
from kedge.pruning.rule_scope import Scope, attribute, integers

if TYPE_CHECKING:
    import onnx


class Entry(enum.Enum):
    """What stands for one axis in a rewritten target."""

    LENGTH = "length"  # the axis' own length
    COPY = "copy"  # 0: as long as the input's axis at that place
    REST = "rest"  # -1: whatever is left
    KEEP = "keep"  # 1: of Expand, as long as the input's axis
    GIVEN = "given"  # what was computed before


def entries(scope: Scope, node: onnx.NodeProto, axes: Sequence[Ids | None]) -> list[Entry] | None:
    """Determine how the target of a Reshape or Expand can be written so that it is valid after a cut.

    Args:
        axes: what the output's axes carry; if none carries anything, nothing need be written and the list is empty.

    Returns:
        An entry for each axis of the output; None if no target would be valid.
    """
    if all(ids is None for ids in axes):
        return []
    return _expand(scope, node, axes) if node.op_type == "Expand" else _reshape(scope, node, axes)


def _reshape(scope: Scope, node: onnx.NodeProto, axes: Sequence[Ids | None]) -> list[Entry] | None:
    before, after = scope.lengths(node.input[0]), scope.lengths(node.output[0])
    made: list[Entry | None] = []
    for axis, (one, other) in enumerate(after):
        if one == other and (axes[axis] is not None or _is_fixed(scope, node, axis)):
            if one == 0:
                return None
            made.append(Entry.LENGTH)
        elif axis < len(before) and before[axis] == (one, other) and _alike(scope, node, axis, axes):
            made.append(Entry.COPY)
        else:
            made.append(None)
    open_axes = [axis for axis, entry in enumerate(made) if entry is None]
    unsure = [axis for axis in open_axes if axes[axis] is not None or not _is_given(scope, node, axis)]
    if len(unsure) > 1:
        return None
    for axis in open_axes:
        made[axis] = Entry.GIVEN
    if unsure or len(open_axes) == 1:
        made[(unsure or open_axes)[0]] = Entry.REST
    return [entry for entry in made if entry is not None]


def _is_fixed(scope: Scope, node: onnx.NodeProto, axis: int) -> bool:
    """Return whether an axis that looks fixed is fixed: the runs showed it, or a constant target states its length."""
    if scope.shapes.varied:
        return True
    return scope.constant(node, 1) is not None and _is_given(scope, node, axis)


def _alike(scope: Scope, node: onnx.NodeProto, axis: int, axes: Sequence[Ids | None]) -> bool:
    """Return whether the input's axis at the same position will be cut like the output's."""
    return same(scope.of(node.input[0])[axis], axes[axis])


def _expand(scope: Scope, node: onnx.NodeProto, axes: Sequence[Ids | None]) -> list[Entry] | None:
    before, after = scope.lengths(node.input[0]), scope.lengths(node.output[0])
    made = []
    for axis, (one, other) in enumerate(after):
        source = axis - len(after) + len(before)
        stays = source >= 0 and before[source] == (one, other)
        if one == other and not (stays and axes[axis] is None):
            made.append(Entry.LENGTH)
        elif stays:
            made.append(Entry.KEEP)
        elif _is_given(scope, node, axis):
            made.append(Entry.GIVEN)
        else:
            return None
    return made


def _is_given(scope: Scope, node: onnx.NodeProto, axis: int) -> bool:
    """Return whether the present target states the length of the axis."""
    seen = scope.shapes.values.get(node.input[1])
    if seen is None or scope.shapes.fixed(node.input[1], 0) != scope.rank(node.output[0]):
        return False
    return (int(seen[0][axis]), int(seen[1][axis])) == scope.lengths(node.output[0])[axis]


def sliced(scope: Scope, node: onnx.NodeProto) -> dict[int, tuple[int, int, int]] | None:
    """Return the axes that a Slice cuts, with start, stop (both within the axis) and step; zeros for a free axis. None
    if the bounds are not constant."""
    if scope.given(node, 1):
        parts = [integers(scope.constant(node, index)) for index in range(1, 5)]
        for index in (3, 4):
            if scope.given(node, index) and parts[index - 1] is None:
                return None
    else:
        parts = [attribute(node, "starts"), attribute(node, "ends"), attribute(node, "axes"), None]
    starts, stops, axes, steps = parts
    if starts is None or stops is None:
        return None
    rank = scope.rank(node.input[0])
    found = {}
    for place, start in enumerate(starts):
        axis = (axes[place] if axes else place) % rank
        length = scope.shapes.fixed(node.input[0], axis)
        step = steps[place] if steps else 1
        if length is None:
            # Of a free axis it matters only that it is cut, and it carries nothing that could be.
            found[axis] = (0, 0, 0)
            continue
        begin, end, stride = slice(start, stops[place], step).indices(length)
        found[axis] = (begin, max(begin, end), stride)
    return found
