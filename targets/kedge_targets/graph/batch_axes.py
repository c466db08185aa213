"""Finds the batch axis of each input and output, and rewrites a graph so that it comes first everywhere.

Recurrent states are ``[layers, batch, units]`` and scores of recognizers ``[time, batch, classes]``; a sample rate has
no batch at all. Inside Kedge the first axis of every tensor counts the samples: :func:`batch_first` rewrites the ends
of the graph accordingly, and :func:`in_own_axes` gives the caller the model's own axes back.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kedge_protocol.bundle.config import NO_BATCH, TensorSpec
from kedge_protocol.errors import ConfigError, ModelError
from kedge_targets.graph import free_dimensions, library, model_reader, nodes, opsets, signature
from kedge_targets.graph.names import Names
from kedge_targets.graph.signature import TensorInfo

if TYPE_CHECKING:
    import onnx

Axis = int | None
"""Position of the batch in the model's own shape; None for a tensor without a batch."""

_BATCH = re.compile(r"(n|b|bs|batch.*)\Z", re.IGNORECASE)
_TIME = re.compile(r"(t|l|time.*|seq.*|frames?|steps?|len.*|length.*)\Z", re.IGNORECASE)
_PRIME = 7919
"""A batch size that no other axis is likely to have, so that shape inference reveals the batch."""
_LENGTHS = (8, 64, 512)
"""Sizes for other dynamic axes if the model must be run to find the batch of an output."""


@dataclass(frozen=True, kw_only=True)
class BatchAxes:
    """The batch axis of each tensor by name; ``states`` maps an input to the output that becomes it in the next
    call."""

    inputs: dict[str, Axis]
    outputs: dict[str, Axis]
    states: dict[str, str]

    def of(self, name: str) -> int:
        """Return the batch axis of a tensor, or :data:`~kedge_protocol.bundle.config.NO_BATCH`."""
        axis = self.inputs[name] if name in self.inputs else self.outputs[name]
        return NO_BATCH if axis is None else axis

    @property
    def plain(self) -> bool:
        """Return whether the batch is the first axis of every tensor."""
        return set(self.inputs.values()) | set(self.outputs.values()) == {0}


def find(model: onnx.ModelProto, *, declared: Mapping[str, int], states: Mapping[str, str]) -> BatchAxes:
    """Find the batch axes of a model: from the user's declaration, then symbols and names, then shape inference with an
    unlikely batch, and finally a run on zeros.

    Args:
        declared: tensor's name → its axis, or :data:`~kedge_protocol.bundle.config.NO_BATCH`.
        states: input → output, as :func:`kedge_targets.graph.states.find` has them.

    Raises:
        ConfigError: ``declared`` names no tensor, or an axis that it does not have.
        ModelError: an input's shape is unknown.
    """
    inputs, outputs = signature.inputs(model), signature.outputs(model)
    _check(declared, [*inputs, *outputs])
    stated: dict[str, Axis] = {name: None if axis == NO_BATCH else axis for name, axis in declared.items()}
    symbols = _symbols(model)
    batch = _batch_symbol(inputs, symbols)
    axes_in = {
        info.name: stated[info.name] if info.name in stated else _of_input(info, symbols[info.name], inputs, batch)
        for info in inputs
    }
    known = {output: axes_in[given] for given, output in states.items()} | stated
    axes_out: dict[str, Axis] = {info.name: known[info.name] for info in outputs if info.name in known}
    free = [(name, axis) for name, axis in axes_in.items() if axis is not None and _size(inputs, name, axis) is None]
    unsure = []
    inferred = _inferred(model, dict.fromkeys(free, _PRIME)) if free else {}
    for info in outputs:
        if info.name in axes_out:
            continue
        found = _of_output(info, symbols[info.name], inferred.get(info.name, info.shape), batch, free=bool(free))
        if found is Ellipsis:
            unsure.append(info)
            axes_out[info.name] = 0
        else:
            axes_out[info.name] = found
    if unsure:
        axes_out |= _probed(model, inputs, axes_in, unsure)
    ordered = {info.name: axes_out[info.name] for info in outputs}
    return BatchAxes(inputs=axes_in, outputs=ordered, states=dict(states))


def _check(declared: Mapping[str, int], tensors: list[TensorInfo]) -> None:
    known = {info.name: len(info.shape) for info in tensors}
    for name, axis in declared.items():
        if name not in known:
            raise ConfigError(
                f"{name!r} is no input or output of the model",
                where="--batch-axis",
                remedy=f"It has {', '.join(known)}",
            )
        if axis != NO_BATCH and not 0 <= axis < known[name]:
            raise ConfigError(
                f"{name!r} has {known[name]} axes, there is no axis {axis}",
                where="--batch-axis",
                remedy="Axes count from 0; `none` stands for a tensor without a batch",
            )


def _symbols(model: onnx.ModelProto) -> dict[str, list[str]]:
    """Return tensor → symbol of each axis, empty for an axis without one."""
    return {
        value.name: [dim.dim_param for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }


def _batch_symbol(inputs: list[TensorInfo], symbols: Mapping[str, list[str]]) -> str:
    firsts = [symbols[info.name][0] for info in inputs if info.shape and symbols[info.name][0]]
    later = [
        symbol
        for info in inputs
        for symbol in symbols[info.name][1:]
        if _BATCH.match(symbol) and (info.shape[0] is not None or _TIME.match(symbols[info.name][0]))
    ]
    named = [symbol for symbol in firsts if _BATCH.match(symbol)]
    for found in (named, later, firsts):
        if found:
            return Counter(found).most_common(1)[0][0]
    return ""


def _size(inputs: list[TensorInfo], name: str, axis: int) -> int | None:
    return next(info.shape[axis] for info in inputs if info.name == name)


def _of_input(info: TensorInfo, symbols: list[str], inputs: list[TensorInfo], batch: str) -> Axis:
    shape = info.shape
    if not shape:
        return None
    if batch and batch in symbols:
        return symbols.index(batch)
    if shape[0] is None:
        return 0
    free_batch = any(other.shape and other.shape[0] is None for other in inputs) or bool(batch)
    if free_batch:
        open_axes = [axis for axis, size in enumerate(shape) if size is None]
        return open_axes[0] if len(open_axes) == 1 and not symbols[open_axes[0]] else None
    firsts = {other.shape[0] for other in inputs if other.shape}
    if len(firsts) == 1 or shape[0] == 1:
        return 0
    return shape.index(1) if 1 in shape else None


def _inferred(model: onnx.ModelProto, fixed: Mapping[tuple[str, int], int]) -> dict[str, tuple[int | None, ...]]:
    """Return the shapes of the outputs for this batch size; nothing if inference fails."""
    try:
        made = free_dimensions.fix_dimensions(_without_output_shapes(model), fixed)
        return {info.name: info.shape for info in signature.outputs(made)}
    except ModelError:
        return {}


def _without_output_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy whose output axes are of unknown size, since an exporter may have written its example's sizes."""
    copy = type(model)()
    copy.CopyFrom(model)
    for value in copy.graph.output:
        for dim in value.type.tensor_type.shape.dim:
            dim.Clear()
    return copy


def _of_output(
    info: TensorInfo, symbols: list[str], inferred: tuple[int | None, ...], batch: str, *, free: bool
) -> Any:
    """Return the batch axis of an output; ``...`` if unknown."""
    if not info.shape:
        return None
    if not free:
        firsts = inferred or info.shape
        if firsts[0] == 1 or info.shape[0] == 1:
            return 0
        return info.shape.index(1) if 1 in info.shape else None
    if _PRIME in inferred:
        return inferred.index(_PRIME)
    if batch and batch in symbols:
        return symbols.index(batch)
    if None not in inferred:
        return None
    return ...


def _probed(
    model: onnx.ModelProto, inputs: list[TensorInfo], axes: Mapping[str, Axis], unsure: list[TensorInfo]
) -> dict[str, Axis]:
    """Run the model on zeros with one, two and three samples: the axis that follows is the batch. If it cannot run, the
    first axis is taken."""
    onnxruntime = library.load()
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    plain = model.SerializeToString()
    try:
        session = onnxruntime.InferenceSession(plain, settings, providers=["CPUExecutionProvider"])
    except Exception:  # noqa: BLE001 -- what is wrong with it is said where it is run with data
        return {}
    names = [info.name for info in unsure]
    alone = False
    for length in _LENGTHS:
        shapes: list[list[tuple[int, ...]]] = []
        try:
            for samples in (1, 2, 3):
                made = session.run(names, _zeros(inputs, axes, samples, length))
                shapes.append([np.shape(array) for array in made])
        except Exception:  # noqa: BLE001 -- another length may fit
            alone |= len(shapes) == 1
            continue
        return {name: _following([one[at] for one in shapes]) for at, name in enumerate(names)}
    # What runs with one sample only has no batch, whatever its inputs say.
    return dict.fromkeys(names) if alone else {}


def _zeros(inputs: list[TensorInfo], axes: Mapping[str, Axis], samples: int, length: int) -> dict[str, Any]:
    made = {}
    for info in inputs:
        shape = [length if size is None else size for size in info.shape]
        at = axes[info.name]
        if at is not None and info.shape[at] is None:
            shape[at] = samples
        made[info.name] = np.zeros(shape, np.dtype(info.dtype))
    return made


def _following(shapes: list[tuple[int, ...]]) -> Axis:
    for axis, found in enumerate(zip(*shapes, strict=True)):
        if found == (1, 2, 3):
            return axis
    return None


def batch_first(model: onnx.ModelProto, axes: BatchAxes) -> onnx.ModelProto:
    """Return a copy with the same names in which the batch is the first axis of all inputs and outputs.

    A tensor without a batch gets one: of such an input the first sample's value is used, such an output belongs to a
    graph of one sample at a time.
    """
    if axes.plain:
        return model
    made = type(model)()
    made.CopyFrom(model)
    single = None in axes.outputs.values()
    free = any(
        axis is not None and info.shape[axis] is None
        for info in signature.inputs(model)
        for axis in [axes.inputs[info.name]]
    )
    names = Names(made)
    before = [_input(made, value, axes.inputs[value.name], names, free=free) for value in _given(made, axes)]
    after = [
        node
        for value in made.graph.output
        for node in _output(made, value, axes.outputs[value.name], names, given=axes.inputs)
    ]
    kept = [*(node for part in before for node in part), *made.graph.node, *after]
    del made.graph.node[:]
    made.graph.node.extend(kept)
    del made.graph.value_info[:]
    nodes.name_nodes(made)
    made = model_reader.infer_shapes(made, where="graph with its batch first")
    if single and free:
        first = {(info.name, 0): 1 for info in signature.inputs(made)}
        made = free_dimensions.fix_dimensions(made, first)
    return made


def _given(made: onnx.ModelProto, axes: BatchAxes) -> list[onnx.ValueInfoProto]:
    return [value for value in made.graph.input if axes.inputs.get(value.name, 0) != 0]


def _input(
    made: onnx.ModelProto, value: onnx.ValueInfoProto, axis: Axis, names: Names, *, free: bool
) -> list[onnx.NodeProto]:
    import onnx

    inner = names.fresh(f"{value.name}_own")
    _read_instead(made.graph, value.name, inner)
    dims = value.type.tensor_type.shape.dim
    own = [_copied(dim) for dim in dims]
    del dims[:]
    if axis is None:
        first = dims.add()
        if free:
            first.dim_param = f"{value.name}_calls"
        else:
            first.dim_value = 1
        dims.extend(own)
        index = names.fresh(f"{value.name}_first")
        made.graph.initializer.append(onnx.numpy_helper.from_array(np.array(0, np.int64), index))
        return [onnx.helper.make_node("Gather", [value.name, index], [inner], names.fresh_node(inner), axis=0)]
    dims.extend([own[axis], *(dim for at, dim in enumerate(own) if at != axis)])
    order = np.argsort(_first(axis, len(own))).tolist()
    return [onnx.helper.make_node("Transpose", [value.name], [inner], names.fresh_node(inner), perm=order)]


def _output(
    made: onnx.ModelProto, value: onnx.ValueInfoProto, axis: Axis, names: Names, *, given: Mapping[str, Axis]
) -> list[onnx.NodeProto]:
    import onnx

    if axis == 0 or value.name in given:
        return []
    inner = names.fresh(f"{value.name}_own")
    _read_instead(made.graph, value.name, inner)
    for node in made.graph.node:
        for at, name in enumerate(node.output):
            if name == value.name:
                node.output[at] = inner
    dims = value.type.tensor_type.shape.dim
    own = [_copied(dim) for dim in dims]
    del dims[:]
    if axis is None:
        dims.add().dim_value = 1
        dims.extend(own)
        if opsets.version(made) < 13:
            return [onnx.helper.make_node("Unsqueeze", [inner], [value.name], names.fresh_node(inner), axes=[0])]
        index = names.fresh(f"{value.name}_first")
        made.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0], np.int64), index))
        return [onnx.helper.make_node("Unsqueeze", [inner, index], [value.name], names.fresh_node(inner))]
    dims.extend([own[axis], *(dim for at, dim in enumerate(own) if at != axis)])
    order = list(_first(axis, len(own)))
    return [onnx.helper.make_node("Transpose", [inner], [value.name], names.fresh_node(inner), perm=order)]


def _copied(dim: Any) -> Any:
    copy = type(dim)()
    copy.CopyFrom(dim)
    return copy


def _first(axis: int, rank: int) -> tuple[int, ...]:
    """Return the permutation that moves an axis to the front."""
    return (axis, *(at for at in range(rank) if at != axis))


def _read_instead(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Make every node read another tensor, including nodes of nested graphs unless they define that name themselves."""
    for node in graph.node:
        for at, name in enumerate(node.input):
            if name == old:
                node.input[at] = new
        for attribute in node.attribute:
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                own = {name for one in inner.node for name in one.output} | {value.name for value in inner.input}
                if old in own:
                    continue
                _read_instead(inner, old, new)
                for value in inner.output:
                    if value.name == old:
                        value.name = new


def in_own_axes(spec: TensorSpec, axis: int) -> TensorSpec:
    """Return a specification of the graph made by :func:`batch_first` in the axes that the model's caller sees."""
    if axis == 0:
        return spec
    if axis == NO_BATCH:
        return replace(spec, shape=spec.shape[1:], batch_axis=NO_BATCH)
    first = _first(axis, len(spec.shape))
    own = tuple(spec.shape[at] for at in np.argsort(first))
    order = tuple(first[at] for at in (spec.file.permutation or range(len(first))))
    same = order == tuple(range(len(order)))
    return replace(spec, shape=own, batch_axis=axis, file=replace(spec.file, permutation=None if same else order))
