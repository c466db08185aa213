"""Pairs what is comparable inside a student and a teacher of another depth or width: the ends of their blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch

from kedge.training import losses
from kedge.training.losses import Head
from kedge_protocol.errors import ConfigError

if TYPE_CHECKING:
    import onnx

Tensor: TypeAlias = torch.Tensor
Computed: TypeAlias = Callable[[Sequence[str]], Mapping[str, Tensor]]
"""Names of tensors → their values on a few samples."""
Pairs: TypeAlias = dict[str, str]
"""The student's tensor → the teacher's."""

WHERE = "step 'distil', layers"


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """The blocks of a network, in the order of the graph.

    Attributes:
        attention: the attention maps, one of each block; empty for a network without attention.
        ends: the tensor at which each block ends; None where that is an output of the graph, which is compared anyway.
        sizes: shape of each end without its channels; empty for a network with attention.
    """

    attention: tuple[str, ...]
    ends: tuple[str | None, ...]
    sizes: tuple[tuple[int, ...], ...] = ()


def blocks(model: onnx.ModelProto, heads: Sequence[Head], computed: Computed) -> Blocks:
    """Find the blocks of a network.

    A transformer has one for each attention, which ends at the last normalization (or, without one, the last addition
    or activation) before the next attention. Any other network has one for each size of its feature maps, which ends
    where the size changes.
    """
    maps = losses.attention_maps(model, heads)
    outputs = {value.name for value in model.graph.output}
    if not maps:
        points = losses.feature_tensors(model, len(model.graph.node))
        shapes = {name: _places(tensor) for name, tensor in computed(points).items() if name in points}
        last = {shapes[name]: name for name in points}
        return Blocks(attention=(), ends=tuple(last.values()), sizes=tuple(last))
    order = {tensor: index for index, node in enumerate(model.graph.node) for tensor in node.output}
    kinds = {tensor: node.op_type for node in model.graph.node for tensor in node.output}
    points = losses.block_ends(model)
    begins = [order[name] for name in maps]
    ends: list[str | None] = []
    for begin, stop in zip(begins, [*begins[1:], len(model.graph.node)], strict=True):
        within = [name for name in points if begin < order[name] < stop]
        normalized = [name for name in within if kinds[name] == "LayerNormalization"]
        found = normalized or within
        ends.append(found[-1] if found and found[-1] not in outputs else None)
    return Blocks(attention=tuple(maps), ends=tuple(ends))


def _places(tensor: Tensor) -> tuple[int, ...]:
    """Return the shape without the channels: images inside a graph are channels first, all else is channels last."""
    axis = 1 if tensor.ndim >= 4 else tensor.ndim - 1
    return tuple(size for index, size in enumerate(tensor.shape) if index != axis)


def layer_map(layers: Sequence[str], student: Blocks, teacher: Blocks) -> list[tuple[int, int]]:
    """Return which of the student's blocks learns from which of the teacher's.

    Args:
        layers: ``STUDENT:TEACHER`` of each pair, from 0; empty for an even spread, with the last on the last (the map
            of Jiao et al., "TinyBERT", 2020), and for the same sizes where neither network has attention.

    Raises:
        ConfigError: a pair cannot be read, or names a block that there is not.
    """
    ours, theirs = len(student.ends), len(teacher.ends)
    if not layers and student.sizes and teacher.sizes:
        return [(a, teacher.sizes.index(size)) for a, size in enumerate(student.sizes) if size in teacher.sizes]
    return pairs(layers, ours, theirs)


def pairs(layers: Sequence[str], ours: int, theirs: int) -> list[tuple[int, int]]:
    """Return pairs of so many blocks of the student and of the teacher; see :func:`layer_map`."""
    if not layers:
        return [(index, round((index + 1) * theirs / ours) - 1) for index in range(ours) if theirs]
    found = []
    for text in layers:
        left, colon, right = text.partition(":")
        if not colon or not (left.strip().isdecimal() and right.strip().isdecimal()):
            raise ConfigError(f"{text!r} is no pair", where=WHERE, remedy='Write layers=["0:1","1:3"]')
        pair = int(left), int(right)
        for index, count, whose in ((pair[0], ours, "student"), (pair[1], theirs, "teacher")):
            if index >= count:
                raise ConfigError(
                    f"{text!r} names block {index} of the {whose}, which has {count}",
                    where=WHERE,
                    remedy=f"Its blocks are 0 to {count - 1}" if count else "It has none; leave layers out",
                )
        found.append(pair)
    return found


def paired(pairs: Sequence[tuple[int, int]], student: Blocks, teacher: Blocks) -> tuple[Pairs, Pairs]:
    """Return the attention maps and the ends of blocks that are compared.

    Where one network has no attention there are no attention maps; ends that are outputs are left out.
    """
    both = bool(student.attention) and bool(teacher.attention)
    maps = {student.attention[a]: teacher.attention[b] for a, b in pairs} if both else {}
    ends = {}
    for a, b in pairs:
        ours, theirs = student.ends[a], teacher.ends[b]
        if ours is not None and theirs is not None:
            ends[ours] = theirs
    return maps, ends
