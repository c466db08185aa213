"""Channel rules of operators that only rearrange data; see :mod:`kedge.pruning.layer_rules`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kedge.pruning import shape_constants
from kedge.pruning.channel_ids import Axes, Ids, none
from kedge.pruning.layer_rules import RULES as LAYERS
from kedge.pruning.layer_rules import Rule, unary
from kedge.pruning.rule_scope import Scope, attribute, integers
from kedge.pruning.shapes import Length, product

if TYPE_CHECKING:
    import onnx

_ONE = (1, 1)


def transposition(node: onnx.NodeProto, scope: Scope) -> list[Axes] | None:
    axes = scope.of(node.input[0])
    order = attribute(node, "perm") or list(reversed(range(len(axes))))
    return [tuple(axes[axis] for axis in order)]


def reshape(node: onnx.NodeProto, scope: Scope) -> list[Axes] | None:
    """Follow channels through Reshape and Flatten. In each run of axes that becomes another run of the same volume, the
    channels of one axis continue, in blocks if the axis was or becomes part of a longer one; the others are held."""
    data, made = node.input[0], node.output[0]
    groups = _runs(scope.lengths(data), scope.lengths(made))
    if groups is None:
        return None
    axes: list[Ids | None] = list(none(scope.rank(made)))
    for before, after in groups:
        flat = _flat(scope, data, before)
        if flat is None:
            continue
        found = _spread(scope, node, flat, after)
        if found is None:
            scope.tracker.hold(flat)
        else:
            axes[found[0]] = found[1]
    if node.op_type == "Reshape" and shape_constants.entries(scope, node, axes) is None:
        return None
    return [tuple(axes)]


def _runs(before: tuple[Length, ...], after: tuple[Length, ...]) -> list[tuple[list[int], list[int]]] | None:
    """Return pairs of runs of axes of equal volume, without axes of length one; None if the axes cannot be paired."""
    ins = [axis for axis, length in enumerate(before) if length != _ONE]
    outs = [axis for axis, length in enumerate(after) if length != _ONE]
    groups = []
    while ins or outs:
        if not (ins and outs):
            return None
        taken, made = [ins.pop(0)], [outs.pop(0)]
        while (one := product([before[axis] for axis in taken])) != (other := product([after[a] for a in made])):
            if one < other and ins:
                taken.append(ins.pop(0))
            elif outs:
                made.append(outs.pop(0))
            else:
                return None
        groups.append((taken, made))
    return groups


def _flat(scope: Scope, name: str, run: list[int]) -> Ids | None:
    """Return what a run of axes carries when merged into one axis."""
    axes, lengths = scope.of(name), scope.lengths(name)
    carrying = [axis for axis in run if axes[axis] is not None]
    if not carrying:
        return None
    chosen, *others = carrying
    scope.tracker.hold(*(axes[axis] for axis in others))
    ids = axes[chosen]
    place = run.index(chosen)
    inner, inner_again = product([lengths[axis] for axis in run[place + 1 :]])
    outer, outer_again = product([lengths[axis] for axis in run[:place]])
    if ids is None or inner != inner_again:
        scope.tracker.hold(ids)
        return None
    flat: Ids = np.repeat(ids, inner)
    if outer == outer_again and len(ids) == scope.shapes.fixed(name, chosen):
        flat = np.tile(flat, outer)
    return flat


def _spread(scope: Scope, node: onnx.NodeProto, flat: Ids, run: list[int]) -> tuple[int, Ids] | None:
    """Return the axis of a run that continues the channels of one axis, and what it carries."""
    lengths = scope.lengths(node.output[0])
    left = len(flat)
    parts: list[tuple[int, int]] = []
    for axis in reversed(run):
        if left == 1:
            break
        one, other = lengths[axis]
        if one == other and left % one == 0:
            part = one
        elif one != other and one % left == 0 and other % left == 0:
            part = left
        else:
            return None
        parts.insert(0, (axis, part))
        left //= part
    if left != 1:
        return None
    places = [place for place, (_, part) in enumerate(parts) if part > 1]
    free = [place for place in places if not _picked_apart(scope, node.output[0], parts[place][0])]
    place = (free or places)[0]
    blocks = np.moveaxis(flat.reshape([part for _, part in parts]), place, 0)
    return parts[place][0], scope.tracker.together(blocks.reshape(len(blocks), -1))


def _picked_apart(scope: Scope, name: str, axis: int) -> bool:
    """Return whether an axis exists only to be split again, such as that of packed queries, keys and values."""
    for node in scope.readers[name]:
        rank = scope.rank(name)
        if node.op_type in ("Gather", "Split", "Slice") and node.input[0] == name:
            if node.op_type == "Slice":
                named = integers(scope.constant(node, 3)) or attribute(node, "axes") or []
            else:
                named = [attribute(node, "axis", 0)]
            if axis in [index % rank for index in named]:
                return True
            continue
        if node.op_type == "Transpose":
            order = attribute(node, "perm") or list(reversed(range(rank)))
            moved = order.index(axis)
        elif node.op_type in ("Unsqueeze", "Squeeze") and scope.known(node.output[0]):
            kept = _kept_axes(node, scope)
            if kept is None or axis not in kept:
                continue
            moved = kept.index(axis)
        elif LAYERS.get(node.op_type) is unary:
            moved = axis
        else:
            continue
        if _picked_apart(scope, node.output[0], moved):
            return True
    return False


def _kept_axes(node: onnx.NodeProto, scope: Scope) -> list[int | None] | None:
    """Return the input axis of each output axis of Squeeze or Unsqueeze."""
    rank = scope.rank(node.input[0])
    if scope.given(node, 1) and scope.constant(node, 1) is None:
        return None
    named = integers(scope.constant(node, 1)) if scope.given(node, 1) else attribute(node, "axes")
    if node.op_type == "Squeeze":
        lengths = scope.lengths(node.input[0])
        gone = {axis % rank for axis in named} if named else {a for a, length in enumerate(lengths) if length == _ONE}
        return [axis for axis in range(rank) if axis not in gone]
    total = rank + len(named or [])
    fresh = {axis % total for axis in named or []}
    source = iter(range(rank))
    return [None if axis in fresh else next(source) for axis in range(total)]


def squeeze(node: onnx.NodeProto, scope: Scope) -> list[Axes] | None:
    kept = _kept_axes(node, scope)
    if kept is None:
        return None
    axes = scope.of(node.input[0])
    return [tuple(None if axis is None else axes[axis] for axis in kept)]


def concatenation(node: onnx.NodeProto, scope: Scope) -> list[Axes] | None:
    rank = scope.rank(node.output[0])
    axis = attribute(node, "axis", 0) % rank
    pieces: list[Ids] = []
    for name in node.input:
        length = scope.shapes.fixed(name, axis)
        if length is None:
            return None
        ids = scope.whole(name, axis)
        if ids is None:
            ids = scope.tracker.fresh(length)
            scope.tracker.hold(ids)
        pieces.append(ids)
    made: list[Ids | None] = []
    for index in range(rank):
        if index == axis:
            made.append(np.concatenate(pieces))
            continue
        carried = [scope.of(name)[index] for name in node.input]
        for ids in carried[1:]:
            scope.tracker.join(carried[0], ids)
        made.append(carried[0])
    return [tuple(made)]


def split(node: onnx.NodeProto, scope: Scope) -> list[Axes] | None:
    axes = scope.of(node.input[0])
    axis = attribute(node, "axis", 0) % len(axes)
    ids = scope.whole(node.input[0], axis)
    made: list[Axes] = []
    start = 0
    for name in node.output:
        length = scope.shapes.fixed(name, axis)
        if ids is not None and length is None:
            return None
        part = None if ids is None or length is None else ids[start : start + length]
        made.append((*axes[:axis], part, *axes[axis + 1 :]))
        start += length or 0
    return made


def cut_out(node: onnx.NodeProto, scope: Scope) -> list[Axes] | None:
    """Follow channels through Slice: along an axis with channels only with step 1 and constant bounds."""
    cuts = shape_constants.sliced(scope, node)
    if cuts is None:
        return None
    axes = list(scope.of(node.input[0]))
    for axis, (start, stop, step) in cuts.items():
        ids = scope.whole(node.input[0], axis)
        if ids is not None and step != 1:
            scope.tracker.hold(ids)
            ids = None
        axes[axis] = None if ids is None else ids[start:stop]
    return [tuple(axes)]


def padding(node: onnx.NodeProto, scope: Scope) -> list[Axes] | None:
    """Follow channels through Pad: channels continue along axes that are not padded."""
    axes = list(scope.of(node.input[0]))
    pads = integers(scope.constant(node, 1)) if scope.given(node, 1) else attribute(node, "pads")
    if pads is None or (scope.given(node, 3) and scope.constant(node, 3) is None):
        return None
    named = integers(scope.constant(node, 3)) or list(range(len(axes)))
    for place, axis in enumerate(named):
        if pads[place] or pads[place + len(named)]:
            scope.tracker.hold(axes[axis])
            axes[axis] = None
    return [tuple(axes)]


def gather(node: onnx.NodeProto, scope: Scope) -> list[Axes] | None:
    """Follow channels through Gather: the indexed axis is held, the others continue. An embedding table produces
    channels."""
    axes = scope.of(node.input[0])
    axis = attribute(node, "axis", 0) % len(axes)
    scope.tracker.hold(axes[axis])
    scope.hold(node.input[1])
    if node.input[0] in scope.constants:
        scope.producing |= {(node.input[0], index) for index in range(len(axes)) if index != axis}
    return [(*axes[:axis], *none(scope.rank(node.input[1])), *axes[axis + 1 :])]


def expansion(node: onnx.NodeProto, scope: Scope) -> list[Axes] | None:
    """Follow channels through Expand: an axis of length one expanded to a constant length can match any other axis."""
    data, made = node.input[0], node.output[0]
    axes: list[Ids | None] = []
    offset = scope.rank(made) - scope.rank(data)
    for axis, (one, other) in enumerate(scope.lengths(made)):
        source = axis - offset
        if source >= 0 and scope.lengths(data)[source] == (one, other):
            axes.append(scope.of(data)[source])
        else:
            axes.append(scope.tracker.fresh(one) if one == other and one > 1 else None)
    if shape_constants.entries(scope, node, axes) is None:
        return None
    return [tuple(axes)]


def tile(node: onnx.NodeProto, scope: Scope) -> list[Axes] | None:
    """Follow channels through Tile: axes that are not repeated continue."""
    before, after = scope.lengths(node.input[0]), scope.lengths(node.output[0])
    axes = list(scope.of(node.input[0]))
    for axis, ids in enumerate(axes):
        if before[axis] != after[axis]:
            scope.tracker.hold(ids)
            axes[axis] = None
    return [tuple(axes)]


def resize(node: onnx.NodeProto, scope: Scope) -> list[Axes] | None:
    """Follow channels through Resize and Upsample by scales: batch and channels must keep their lengths."""
    if node.op_type == "Resize" and (scope.given(node, 3) or scope.given(node, 1)):
        return None
    axes = scope.of(node.input[0])
    scope.tracker.hold(*axes[2:])
    if scope.lengths(node.input[0])[:2] != scope.lengths(node.output[0])[:2]:
        return None
    return [(*axes[:2], *none(len(axes) - 2))]


RULES: dict[str, Rule] = {
    **LAYERS,
    "Transpose": transposition,
    "Reshape": reshape,
    "Flatten": reshape,
    "Squeeze": squeeze,
    "Unsqueeze": squeeze,
    "Concat": concatenation,
    "Split": split,
    "Slice": cut_out,
    "Pad": padding,
    "Gather": gather,
    "Expand": expansion,
    "Tile": tile,
    "Resize": resize,
    "Upsample": resize,
}
