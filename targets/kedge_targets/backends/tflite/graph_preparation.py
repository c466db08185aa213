"""Prepares the graph for onnx2tf: fixed shapes, folded constants, channels first, a name for every node."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from kedge_protocol.errors import LoweringError
from kedge_targets.backends.tflite import gelu, hard_activations, norms, pooling, unrolling
from kedge_targets.graph import attention, batch, library, model_reader, model_writer, nodes, opsets, signature

if TYPE_CHECKING:
    import onnx

_TO_CHANNELS_FIRST = {3: (0, 2, 1), 4: (0, 3, 1, 2), 5: (0, 4, 1, 2, 3)}
_TO_CHANNELS_LAST = {3: (0, 2, 1), 4: (0, 2, 3, 1), 5: (0, 2, 3, 4, 1)}

Permutation: TypeAlias = tuple[int, ...]

_OPSET = 13  # below it, axes and bounds are attributes that what is done here does not know
_SAME_OF_ONE = frozenset({"ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum"})
"""Reductions that leave a single number as it is."""
_PLAIN = re.compile(r"[A-Za-z0-9./][A-Za-z0-9_./-]*")


def prepare(
    model: onnx.ModelProto, *, fold: bool = True, plain_norms: bool = False, mask: float = attention.ENOUGH
) -> tuple[onnx.ModelProto, dict[str, Permutation]]:
    """Return a copy of ``model`` for the converter, and input → permutation where the copy has its axes in another
    order: ``copy = model.transpose(permutation)``. A dynamic batch becomes 1.

    Args:
        model: the trained model's graph, in which only the batch may be dynamic.
        fold: let ONNX Runtime fold constants and shapes first.
        plain_norms: write each LayerNormalization out.
        mask: what takes the place of minus infinity in the masks of attention.
    """
    fixed = batch.fix_batch(opsets.raise_opset(model, _OPSET, where="the graph"), batch.size(model) or 1)
    nodes.name_nodes(fixed)
    _drop_empty_reductions(fixed)
    if any(node.op_type == "GroupNormalization" for node in fixed.graph.node):
        fixed = model_reader.infer_shapes(fixed, where="the graph")
        norms.spell_out_groups(fixed)
    made = _folded(fixed) if fold else fixed
    model_writer.strip(made)
    _drop_constant_inputs(made)
    turned = _take_transposes_off_inputs(made)
    _take_transposes_off_outputs(made)
    attention.bound_masks(made, mask)
    norms.spell_out(made)
    hard_activations.spell_out(made)
    made = model_reader.infer_shapes(made, where="the prepared graph")
    unrolling.unroll(made)
    if plain_norms:
        norms.spell_out_layers(made)
    pooling.spell_out_pads(made)
    made = model_reader.infer_shapes(made, where="the prepared graph")
    gelu.fuse(made)  # last, since shapes are not inferred through it
    nodes.name_nodes(made)
    return made, turned


def with_plain_names(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, str]]:
    """Return a copy in which every name is valid as a TensorFlow scope (no spaces, no accents, no colons), and new →
    old name of the nodes that were renamed. Graphs within the graph are renamed alike: they read what is around them.
    """
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    every = list(nodes.graphs(copy.graph))
    names = _Plain({node.name for graph in every for node in graph.node})
    values = [one for graph in every for one in (*graph.input, *graph.output, *graph.initializer, *graph.value_info)]
    tensors = _Plain(
        {name for graph in every for node in graph.node for name in (*node.input, *node.output)}
        | {value.name for value in values}
    )
    for node in (node for graph in every for node in graph.node):
        node.name = names(node.name)
        for given in (node.input, node.output):
            for index, name in enumerate(given):
                given[index] = tensors(name)
    for value in values:
        value.name = tensors(value.name)
    return copy, {new: old for old, new in names.changed.items()}


class _Plain:
    """Maps names to plain names."""

    def __init__(self, taken: set[str]) -> None:
        self._taken = set(taken)
        self.changed: dict[str, str] = {}

    def __call__(self, name: str) -> str:
        if _PLAIN.fullmatch(name) or not name:
            return name
        if name not in self.changed:
            base = re.sub(r"[^A-Za-z0-9_./]", "_", name).lstrip("_") or "renamed"
            new, count = base, 1
            while new in self._taken:
                count += 1
                new = f"{base}_{count}"
            self._taken.add(new)
            self.changed[name] = new
        return self.changed[name]


def kept_inputs(model: onnx.ModelProto) -> list[str]:
    """Return the inputs whose axes onnx2tf must leave alone. It moves the channels of every input with three or more
    axes to the end, which is right only if the second axis is the channels."""
    kept = []
    for info in signature.inputs(model):
        channels_first = info.layout is not None and info.layout[1:2] == "C"
        if not channels_first:
            kept.append(info.name)
    return kept


def _folded(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph after ONNX Runtime's basic optimizations: folded constants and shapes, nothing outside the ONNX
    standard."""
    onnxruntime = library.load()
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder, "before.onnx"), Path(folder, "after.onnx")
        model_writer.save(model, before)
        options.optimized_model_filepath = str(after)
        try:
            onnxruntime.InferenceSession(str(before), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the library's errors have no common base but Exception
            raise LoweringError(f"ONNX Runtime cannot load the graph: {error}") from error
        return model_reader.load(after)


def _drop_empty_reductions(model: onnx.ModelProto) -> None:
    """Replace reductions over no axis, with which TensorFlow's would reduce all, by what they compute, in place."""
    empty = {tensor.name for tensor in model.graph.initializer if 0 in tensor.dims}
    for node in model.graph.node:
        noop = any(one.name == "noop_with_empty_axes" and one.i for one in node.attribute)
        if noop and node.op_type in _SAME_OF_ONE and all(not name or name in empty for name in node.input[1:]):
            node.op_type = "Identity"
            del node.attribute[:]
            del node.input[1:]


def _drop_constant_inputs(model: onnx.ModelProto) -> None:
    """Remove initializers from the inputs if listed there too (IR version 3), in place; the converter would expect
    them."""
    constant = {tensor.name for tensor in model.graph.initializer}
    kept = [value for value in model.graph.input if value.name not in constant]
    del model.graph.input[:]
    model.graph.input.extend(kept)


def _take_transposes_off_inputs(model: onnx.ModelProto) -> dict[str, Permutation]:
    """Remove the transposition of inputs with channels last that are transposed immediately, in place; return it by
    input. The graph then has channels first, which onnx2tf turns into channels last by itself."""
    turned = {}
    for value in model.graph.input:
        consumers = [node for node in model.graph.node if value.name in node.input]
        dims = value.type.tensor_type.shape.dim
        if len(consumers) != 1 or _permutation(consumers[0]) != _TO_CHANNELS_FIRST.get(len(dims), ()):
            continue
        if any(output.name == consumers[0].output[0] for output in model.graph.output):
            continue
        turned[value.name] = _TO_CHANNELS_FIRST[len(dims)]
        _reshape(value, turned[value.name])
        _redirect(model, consumers[0].output[0], value.name)
        model.graph.node.remove(consumers[0])
    return turned


def _take_transposes_off_outputs(model: onnx.ModelProto) -> None:
    """Do the same for outputs that are transposed to channels last at the very end."""
    for value in model.graph.output:
        makers = [node for node in model.graph.node if value.name in node.output]
        rank = len(value.type.tensor_type.shape.dim)
        if len(makers) != 1 or _permutation(makers[0]) != _TO_CHANNELS_LAST.get(rank, ()):
            continue
        source = makers[0].input[0]
        used = [node for node in model.graph.node if source in node.input or value.name in node.input]
        made = [node for node in model.graph.node if source in node.output]
        if used != [makers[0]] or len(made) != 1 or any(output.name == source for output in model.graph.output):
            continue
        _reshape(value, _TO_CHANNELS_FIRST[rank])
        model.graph.node.remove(makers[0])
        for index, name in enumerate(made[0].output):
            if name == source:
                made[0].output[index] = value.name


def _permutation(node: onnx.NodeProto) -> tuple[int, ...] | None:
    if node.op_type != "Transpose" or node.domain not in ("", nodes.DEFAULT_DOMAIN):
        return None
    return next((tuple(item.ints) for item in node.attribute if item.name == "perm"), None)


def _reshape(value: onnx.ValueInfoProto, permutation: tuple[int, ...]) -> None:
    dims = value.type.tensor_type.shape.dim
    sizes = [dims[axis].dim_value for axis in permutation]
    for dim, size in zip(dims, sizes, strict=True):
        dim.dim_value = size


def _redirect(model: onnx.ModelProto, old: str, new: str) -> None:
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == old:
                node.input[index] = new
