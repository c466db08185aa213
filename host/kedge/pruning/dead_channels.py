"""Dead channels: zero weights produce them, so that they are constant, or zero weights read them.

Training with ReLU and weight decay leaves many (in a published MobileNet for 96 pixels: most of its parameters). A
constant is folded into the bias of the layer that reads it. A padded convolution does not see it as constant at the
border; there one channel is kept for all constants, with their weights summed in proportion. The outputs stay the same
but for the rounding of float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge.pruning import constant_folding, inference_session, surgery
from kedge.pruning.groups import Group, Structure, structure
from kedge.pruning.rule_scope import Place, attribute

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]

NEGLIGIBLE = 1e-12
"""Share of a layer's largest weight: smaller weights make no difference in float32 sums."""
_SAME = 1e-6
"""Share of a tensor's largest value by which a constant may vary over positions and samples."""
_LOSSLESS = 1e-5
"""Share of an output's largest value by which it may differ: float32 sums in another order."""
SAMPLES = 8


@dataclass(kw_only=True)
class Dropped:
    """A graph without its dead channels; ``channels`` maps group → number removed and number before."""

    model: onnx.ModelProto
    channels: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Return the number of channels removed."""
        return sum(gone for gone, _ in self.channels.values())

    @property
    def note(self) -> str:
        """Describe what was removed."""
        listed = ", ".join(f"{name} {size} → {size - gone}" for name, (gone, size) in self.channels.items())
        return f"{self.count} dead channels were dropped ({listed}): they carried constants, the answers stay the same"


def suspected(model: onnx.ModelProto) -> bool:
    """Return whether any matrix or kernel has a row or column of zeros, or any normalization a scale of zero: a quick
    check before anything is run."""
    from onnx import numpy_helper

    readers = {name for node in model.graph.node if node.op_type in _LAYERS for name in node.input[1:2]}
    scales = {node.input[1] for node in model.graph.node if node.op_type == "BatchNormalization"}
    for tensor in model.graph.initializer:
        if tensor.name in scales and not numpy_helper.to_array(tensor).all():
            return True
        if tensor.name in readers and len(tensor.dims) >= 2:
            value = np.abs(numpy_helper.to_array(tensor).astype(np.float32))
            least = NEGLIGIBLE * float(value.max(initial=0.0))
            for axis in (0, 1):
                largest = value.max(axis=tuple(at for at in range(value.ndim) if at != axis), initial=0.0)
                if (largest <= least).any():
                    return True
    return False


_LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


def drop(model: onnx.ModelProto, samples: Sequence[Mapping[str, Array]]) -> Dropped:
    """Remove the dead channels of a graph. Return the given graph if there are none, or if its outputs on the samples
    would change.

    Args:
        samples: feeds, first axis the batch.

    Raises:
        UnsupportedOperatorError, ModelError: ONNX Runtime does not load the graph.
    """
    if not samples or not suspected(model):
        return Dropped(model=model)
    biased = _with_biases(model)
    found = structure(biased, {name: array.shape for name, array in samples[0].items()})
    work = _Work(found, samples)
    removed = {group: gone for group in found.groups if (gone := work.dead(group))}
    if not removed:
        return Dropped(model=model)
    made = surgery.cut(found, removed.items())
    _without_empty_biases(made, _biases(model))
    if not _same(model, made, samples):
        return Dropped(model=model)
    return Dropped(model=made, channels={group.name: (len(gone), group.size) for group, gone in removed.items()})


@dataclass(frozen=True)
class _Reader:
    """A layer that reads a group's channels: its weight, and the axis of its data along which they lie."""

    node: onnx.NodeProto
    place: Place
    data: str
    axis: int

    @property
    def folds(self) -> bool:
        """Return whether a constant input adds a constant to the layer's output, which its bias can take."""
        if self.node.op_type == "Gemm":
            return True
        padded = any(attribute(self.node, "pads", [])) or attribute(self.node, "auto_pad", b"NOTSET") not in (
            b"NOTSET",
            b"VALID",
        )
        return self.node.op_type == "Conv" and not padded

    @property
    def adds_up(self) -> bool:
        """Return whether the layer's output is a weighted sum over the channels of its input."""
        return self.node.op_type in ("Gemm", "MatMul") or (
            self.node.op_type == "Conv" and attribute(self.node, "group", 1) == 1
        )


class _Work:
    """Finds the dead channels of a structure and changes its constants so that they can be removed."""

    def __init__(self, found: Structure, samples: Sequence[Mapping[str, Array]]) -> None:
        self._found = found
        self._readers = {group: self._reading(group) for group in found.groups}
        wanted = sorted({reader.data for readers in self._readers.values() for reader in readers})
        self._seen = _observed(found.model, wanted, samples)

    def dead(self, group: Group) -> list[int]:
        """Return the channels of a group that can be removed now."""
        readers = self._readers[group]
        if not readers or len(readers) < len(group.consuming):
            return []
        unread = self._all_small(group, [reader.place for reader in readers])
        constant = self._constant(group, readers)
        if (unread | constant).all():
            unread[0] = constant[0] = False  # a layer keeps one channel
        lone = [channel for channel in range(group.size) if unread[channel]]
        fixed = [channel for channel in range(group.size) if constant[channel] and not unread[channel]]
        return sorted(lone + self._folded(group, readers, fixed))

    def _reading(self, group: Group) -> list[_Reader]:
        scope, readers = self._found.scope, []
        for place in group.consuming:
            for node in scope.readers[place[0]]:
                if node.op_type in _LAYERS and place[0] == node.input[1]:
                    axis = 1 if node.op_type in ("Conv", "ConvTranspose") else scope.rank(node.input[0]) - 1
                    readers.append(_Reader(node, place, node.input[0], axis))
        return readers

    def _all_small(self, group: Group, places: Sequence[Place]) -> Array:
        """Return for each channel whether its weights are zero in all these places."""
        small = np.ones(group.size, dtype=bool)
        for place in places:
            weight = np.abs(self._found.weight(place))
            largest = weight.reshape(len(weight), -1).max(axis=1, initial=0.0)
            least = NEGLIGIBLE * float(largest.max(initial=0.0))
            small &= [bool((largest[indices] <= least).all()) for indices in group.members[place]]
        return small

    def _constant(self, group: Group, readers: Sequence[_Reader]) -> Array:
        """Return for each channel whether it is independent of the input: zero weights produce it, and it was never
        seen to vary."""
        scope, roots = self._found.scope, self._found.roots
        makers = []
        for place in group.producing:
            for node in scope.readers[place[0]]:
                data = node.input[0]
                own = (
                    scope.of(data)[1 if node.op_type in ("Conv", "ConvTranspose") else -1]
                    if data in scope.axes
                    else None
                )
                if own is None or not np.isin(roots[own], group.roots).any():
                    makers.append(place)
        still = np.ones(group.size, dtype=bool) if makers else np.zeros(group.size, dtype=bool)
        scaled = self._all_small(group, group.scaling) if len(group.scaling) >= len(makers) > 0 else ~still
        still &= self._all_small(group, makers) | scaled
        for reader in readers:
            low, high, largest = self._seen[reader.data]
            for channel, indices in enumerate(group.members[reader.place]):
                still[channel] &= bool((high[indices] - low[indices] <= _SAME * largest).all())
        return still

    def _folded(self, group: Group, readers: Sequence[_Reader], fixed: Sequence[int]) -> list[int]:
        """Move the constants of channels to the layers that read them; return the channels that can then be removed."""
        strict = [reader for reader in readers if not (reader.folds and reader.adds_up and self._has_bias(reader))]
        moving = [channel for channel in fixed if any(self._value(group, one, channel).any() for one in strict)]
        kept: int | None = None
        if moving:
            kept = self._representative(group, strict, moving)
            if kept is None:
                fixed = [channel for channel in fixed if channel not in moving]
        gone = [channel for channel in fixed if channel != kept]
        for reader in readers:
            if reader in strict:
                self._merge(group, reader, kept, [channel for channel in gone if channel in moving])
            else:
                self._to_bias(group, reader, gone)
        return gone

    def _value(self, group: Group, reader: _Reader, channel: int) -> Array:
        low, high, largest = self._seen[reader.data]
        indices = group.members[reader.place][channel]
        middle: Array = (low[indices] + high[indices]) / 2
        return np.where(np.abs(middle) <= NEGLIGIBLE * largest, 0.0, middle)

    def _representative(self, group: Group, strict: Sequence[_Reader], moving: Sequence[int]) -> int | None:
        """Return the channel that stands for all constants, the one with the largest values where they are read; None
        if none can."""
        if not all(reader.adds_up for reader in strict):
            return None
        values = {channel: [self._value(group, reader, channel) for reader in strict] for channel in moving}
        used = [any(values[channel][at].any() for channel in moving) for at in range(len(strict))]

        def least(channel: int) -> float:
            return min(float(np.abs(values[channel][at]).min()) for at in range(len(strict)) if used[at])

        best = max(moving, key=least)
        return best if least(best) > 0 else None

    def _merge(self, group: Group, reader: _Reader, kept: int | None, gone: Sequence[int]) -> None:
        if kept is None or not gone:
            return
        value = self._weight(reader.place)
        base = self._value(group, reader, kept)
        if not base.any():
            return
        target = group.members[reader.place][kept]
        for channel in gone:
            share = self._value(group, reader, channel) / base
            part = value[group.members[reader.place][channel]]
            value[target] += part * share.reshape(-1, *(1 for _ in part.shape[1:]))
        self._store(reader.place, value)

    def _has_bias(self, reader: _Reader) -> bool:
        name = reader.node.input[2] if len(reader.node.input) > 2 else ""
        tensor = self._found.scope.constants.get(name)
        return tensor is not None and len(tensor.dims) == 1 and tensor.dims[0] > 1

    def _to_bias(self, group: Group, reader: _Reader, gone: Sequence[int]) -> None:
        if not gone:
            return
        value = self._weight(reader.place)
        # What is summed with the channel: the outputs stay, kernel positions go.
        rows = value.reshape(len(value), value.shape[1], -1).sum(axis=2)
        shift = sum(
            (rows[group.members[reader.place][c]] * self._value(group, reader, c)[:, None]).sum(axis=0) for c in gone
        )
        bias = self._weight((reader.node.input[2], -1))
        self._store((reader.node.input[2], -1), bias + np.reshape(shift, -1))

    def _weight(self, place: Place) -> Array:
        """Return the constant of a place in float64, with the axis of the channels first."""
        from onnx import numpy_helper

        value: Array = numpy_helper.to_array(_initializer(self._found.model, place[0])).astype(np.float64)
        return np.moveaxis(value, place[1], 0).copy()

    def _store(self, place: Place, value: Array) -> None:
        from onnx import numpy_helper

        tensor = _initializer(self._found.model, place[0])
        dtype = numpy_helper.to_array(tensor).dtype
        back = np.ascontiguousarray(np.moveaxis(value, 0, place[1]).astype(dtype))
        tensor.CopyFrom(numpy_helper.from_array(back, tensor.name))


def _initializer(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def _observed(
    model: onnx.ModelProto, names: Sequence[str], samples: Sequence[Mapping[str, Array]]
) -> dict[str, tuple[Array, Array, float]]:
    """Return tensor → smallest and largest value of each channel, and the largest magnitude of all. Channels lie along
    the last axis if a layer reads the tensor along it, else along the second."""
    if not names:
        return {}  # ONNX Runtime takes no name for every output
    along = {
        node.input[0]: 1 if node.op_type in ("Conv", "ConvTranspose") else -1
        for node in model.graph.node
        if node.op_type in _LAYERS
    }
    session = inference_session.session(model, where="the graph with its tensors", outputs=names)
    found: dict[str, tuple[Array, Array, float]] = {}
    for feed in samples:
        for name, value in zip(names, session.run(list(names), dict(feed)), strict=True):
            rows = np.moveaxis(value.astype(np.float64), along[name], 0)
            rows = rows.reshape(len(rows), -1)
            low, high, largest = rows.min(axis=1), rows.max(axis=1), float(np.abs(rows).max(initial=0.0))
            if name in found:
                before = found[name]
                low, high = np.minimum(low, before[0]), np.maximum(high, before[1])
                largest = max(largest, before[2])
            found[name] = (low, high, largest)
    return found


def _same(before: onnx.ModelProto, after: onnx.ModelProto, samples: Sequence[Mapping[str, Array]]) -> bool:
    first = inference_session.session(before, where="the graph")
    second = inference_session.session(after, where="the graph without its dead channels")
    for feed in samples:
        for one, other in zip(first.run(None, dict(feed)), second.run(None, dict(feed)), strict=True):
            if one.dtype.kind != "f":
                if not np.array_equal(one, other):
                    return False
                continue
            if np.abs(one - other).max(initial=0.0) > _LOSSLESS * np.abs(one).max(initial=0.0):
                return False
    return True


def _biases(model: onnx.ModelProto) -> set[str]:
    return {node.input[2] for node in model.graph.node if node.op_type in ("Conv", "Gemm") and len(node.input) > 2}


def _with_biases(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which every convolution and Gemm has its own bias, a vector as long as its outputs."""
    from onnx import numpy_helper

    made = type(model)()
    made.CopyFrom(model)
    stored = {tensor.name: tensor for tensor in made.graph.initializer}
    for node in made.graph.node:
        weight = stored.get(node.input[1]) if node.op_type in ("Conv", "Gemm") else None
        if weight is None or (len(node.input) > 2 and node.input[2]):
            continue
        turned = node.op_type == "Gemm" and not attribute(node, "transB", 0)
        zeros = np.zeros(weight.dims[1 if turned else 0], numpy_helper.to_array(weight).dtype)
        name = f"{node.name}_dead_bias"
        made.graph.initializer.append(numpy_helper.from_array(zeros, name))
        del node.input[2:]
        node.input.append(name)
    return made


def _without_empty_biases(model: onnx.ModelProto, own: set[str]) -> None:
    """Remove the added biases that are still zero."""
    from onnx import numpy_helper

    empty = {
        tensor.name
        for tensor in model.graph.initializer
        if tensor.name not in own and not numpy_helper.to_array(tensor).any()
    }
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm") and len(node.input) > 2 and node.input[2] in empty:
            del node.input[2:]
    constant_folding.drop_unread(model)
