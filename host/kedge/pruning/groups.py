"""Finds what can be cut from a graph: groups of channels of one kind, each channel with everything that depends on
it."""

from __future__ import annotations

import enum
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge.pruning import constant_folding, dependency_graph, split_shared_initializers
from kedge.pruning.channel_ids import Ids
from kedge.pruning.rule_scope import Place, Scope
from kedge.pruning.shapes import Example

if TYPE_CHECKING:
    import onnx


class Kind(enum.Enum):
    """The kind of a group's channels."""

    CHANNELS = "channels"
    HEADS = "heads"
    WIDTH = "width"  # between two matrix products


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that can each be cut from the same places, as long as one is left.

    Attributes:
        name: of the node that makes them; of the first if there are several.
        nodes: all nodes whose weights make or scale the channels.
        kind: what the channels are.
        members: constant and axis → for each channel its indices along that axis.
        producing, consuming, scaling: the places that make the channels, read them, or scale them.
    """

    name: str
    nodes: tuple[str, ...]
    kind: Kind
    members: Mapping[Place, tuple[Ids, ...]]
    producing: tuple[Place, ...]
    consuming: tuple[Place, ...]
    scaling: tuple[Place, ...]
    roots: Ids

    @property
    def size(self) -> int:
        """Return the number of channels."""
        return len(self.roots)


@dataclass(frozen=True, eq=False)
class Structure:
    """A graph and what can be cut from it.

    Attributes:
        model: the graph, with constants folded and masks copied for each reader.
        groups: in the order of the graph.
        scope: how channels pass through the graph; for :func:`kedge.pruning.surgery.cut`.
        roots: number of a channel → the number that stands for everything joined with it.
    """

    model: onnx.ModelProto
    groups: tuple[Group, ...]
    scope: Scope
    roots: Ids

    def of_kinds(self, *kinds: Kind) -> tuple[Group, ...]:
        """Return the groups of these kinds."""
        return tuple(group for group in self.groups if group.kind in kinds)

    def alive(self, removed: Iterable[tuple[Group, Iterable[int]]]) -> npt.NDArray[np.bool_]:
        """Return for each number whether it is left after removing channels, given as groups with the indices of their
        channels."""
        gone = np.zeros(self.scope.tracker.count, dtype=bool)
        for group, indices in removed:
            gone[group.roots[list(indices)]] = True
        left: npt.NDArray[np.bool_] = ~gone[self.roots]
        return left

    def weight(self, place: Place) -> npt.NDArray[Any]:
        """Return the constant of a place as float32, with the place's axis first."""
        from onnx import numpy_helper

        value: npt.NDArray[Any] = numpy_helper.to_array(self.scope.constants[place[0]])
        return np.moveaxis(value.astype(np.float32), place[1], 0)


def structure(model: onnx.ModelProto, example: Example | None = None) -> Structure:
    """Find what can be cut from a graph, without changing it.

    Args:
        example: see :func:`kedge.pruning.shapes.observed`.

    Raises:
        UnsupportedOperatorError, ModelError: ONNX Runtime does not load the graph.
    """
    simple = constant_folding.fold_constants(model)
    split_shared_initializers.split_shared_initializers(simple)
    scope = dependency_graph.follow_channels(simple, example)
    roots, held = scope.tracker.solved()
    places: dict[int, dict[Place, Ids]] = defaultdict(dict)
    for name in scope.constants:
        for axis, ids in enumerate(scope.axes[name]):
            if ids is None:
                continue
            for root, indices in _by_root(roots[ids]).items():
                if not held[root]:
                    places[root][name, axis] = indices
    alike: dict[frozenset[Place], list[int]] = defaultdict(list)
    for root, found in places.items():
        if scope.producing.intersection(found):
            alike[frozenset(found)].append(root)
    heads = {int(root) for ids in scope.heads for root in roots[ids]}
    order = {node.name: index for index, node in enumerate(simple.graph.node)}
    groups = [_group(scope, sorted(members), places, heads, order) for members in alike.values() if len(members) > 1]
    groups.sort(key=lambda group: (order[group.name], int(group.roots[0])))
    return Structure(simple, tuple(groups), scope, roots)


def _by_root(roots: Ids) -> dict[int, Ids]:
    order = np.argsort(roots, kind="stable")
    unique, starts = np.unique(roots[order], return_index=True)
    return dict(zip(map(int, unique), np.split(order, starts[1:]), strict=True))


def _group(
    scope: Scope, roots: list[int], places: Mapping[int, Mapping[Place, Ids]], heads: set[int], order: Mapping[str, int]
) -> Group:
    every = sorted(places[roots[0]])
    making = [place for place in every if place in scope.producing or place in scope.scaling]
    makers = sorted({node.name for name, _ in making for node in scope.readers[name]}, key=order.__getitem__)
    readers = {
        node.op_type
        for place in every
        if place in scope.producing or place in scope.consuming
        for node in scope.readers[place[0]]
    }
    kind = Kind.CHANNELS
    if heads.intersection(roots):
        kind = Kind.HEADS
    elif readers <= {"MatMul", "Gemm"}:
        kind = Kind.WIDTH
    first = min(
        (place for place in every if place in scope.producing),
        key=lambda place: min(order[node.name] for node in scope.readers[place[0]]),
    )
    return Group(
        name=min((node.name for node in scope.readers[first[0]]), key=order.__getitem__),
        nodes=tuple(makers),
        kind=kind,
        members={place: tuple(places[root][place] for root in roots) for place in every},
        producing=tuple(place for place in every if place in scope.producing),
        consuming=tuple(place for place in every if place in scope.consuming),
        scaling=tuple(place for place in every if place in scope.scaling),
        roots=np.asarray(roots, dtype=np.int64),
    )
