"""Prepares a graph for FINN: one sample at once, all attributes explicit, averages as convolutions.

Attributes that FINN reads but ONNX leaves to defaults are made explicit; the results do not change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from kedge_protocol.errors import ModelError
from kedge_targets.graph import auto_pad, batch, dead_code, model_reader, qonnx, qonnx_nodes, topological_order
from kedge_targets.graph.wiring import Wiring

if TYPE_CHECKING:
    import onnx

_MOVES = frozenset({"Flatten", "Reshape", "Identity", "Squeeze", "Unsqueeze"})
_AVERAGES = frozenset({"AveragePool", "GlobalAveragePool"})


def single(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy that takes one sample at once, with the shapes of all tensors, including those behind QONNX's
    nodes.

    Raises:
        ModelError: its batch is fixed to more than one.
    """
    made = batch.fix_batch(model, 1)
    qonnx_nodes.normalize(made)
    # ONNX's own inference stops at operators that it does not know; the same tensors stand in the expanded graph.
    wide = model_reader.infer_shapes(qonnx.expand_qonnx(made), where="graph with one sample at once")
    known = {value.name for value in (*made.graph.input, *made.graph.output)}
    tensors = {tensor for node in made.graph.node for tensor in node.output} - known
    del made.graph.value_info[:]
    made.graph.value_info.extend(value for value in wide.graph.value_info if value.name in tensors)
    return made


def fold_constants(model: onnx.ModelProto) -> None:
    """Replace what is constant once shapes are fixed (Shape and what exporters compute from it) by its value, in place;
    QONNX's nodes and their inputs stay."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    shapes = shapes_of(model)
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    kept = []
    for node in model.graph.node:
        found: list[Any] | None = None
        if node.op_type == "Shape" and node.input[0] in shapes and not node.attribute:
            found = [np.asarray(shapes[node.input[0]], dtype=np.int64)]
        elif node.domain in ("", "ai.onnx") and all(name in values for name in node.input if name):
            used = {name for name in node.input if name}
            feed = {name: onnx.numpy_helper.to_array(values[name]) for name in used}
            found = ReferenceEvaluator(_alone(node, model)).run(None, feed)
        if found is None:
            kept.append(node)
            continue
        for name, value in zip(node.output, found, strict=True):
            values[name] = onnx.numpy_helper.from_array(np.ascontiguousarray(value).reshape(np.shape(value)), name)
            model.graph.initializer.append(values[name])
    del model.graph.node[:]
    model.graph.node.extend(kept)
    dead_code.remove_dead_nodes(model)


def _alone(node: onnx.NodeProto, model: onnx.ModelProto) -> onnx.ModelProto:
    import onnx

    given = [onnx.helper.make_empty_tensor_value_info(name) for name in dict.fromkeys(node.input) if name]
    made = [onnx.helper.make_empty_tensor_value_info(name) for name in node.output]
    graph = onnx.helper.make_graph([node], "constant", given, made)
    standard = [opset for opset in model.opset_import if opset.domain in ("", "ai.onnx")]
    return onnx.helper.make_model(graph, opset_imports=standard)


def shapes_of(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Return tensor → shape, for those whose shape is fully known."""
    found = {}
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        sizes = [axis.dim_value for axis in value.type.tensor_type.shape.dim]
        if value.type.tensor_type.HasField("shape") and all(size > 0 for size in sizes):
            found[value.name] = tuple(sizes)
    return found


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """Return a node's attributes: name → value."""
    import onnx

    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def complete_attributes(model: onnx.ModelProto) -> list[str]:
    """Make the attributes of convolutions and poolings explicit, in place.

    Returns:
        Names of the nodes that lacked any attribute.

    Raises:
        ModelError: the shape of an input with ``auto_pad`` is unknown; names the node.
    """
    shapes, wiring = shapes_of(model), Wiring(model)
    lacking = []
    for node in model.graph.node:
        if node.op_type not in ("Conv", "MaxPool", "AveragePool"):
            continue
        have = attributes_of(node)
        kernel = have.get("kernel_shape")
        if kernel is None and node.op_type == "Conv":
            kernel = _weight_shape(node, shapes, wiring)[2:]
        if kernel is None:
            continue  # ONNX demands it of a pooling
        rank = len(kernel)
        strides, dilations = have.get("strides", [1] * rank), have.get("dilations", [1] * rank)
        how = (have.get("auto_pad") or b"NOTSET").decode()
        whole = {"kernel_shape": list(kernel), "strides": list(strides)}
        if how == "NOTSET":
            whole["pads"] = list(have.get("pads", [0] * (2 * rank)))
        else:
            whole["pads"] = _pads(how, node, shapes, list(kernel), list(strides), list(dilations))
        if node.op_type == "Conv":
            whole |= {"dilations": list(dilations), "group": have.get("group", 1)}
        if any(name not in have for name in whole) or how != "NOTSET":
            lacking.append(node.name)
        _set(node, whole)
    return lacking


def _weight_shape(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]], wiring: Wiring) -> tuple[int, ...]:
    from kedge_targets.graph.layers import weight_value

    value = weight_value(node.input[1], wiring)
    shape = shapes.get(node.input[1]) if value is None else value.shape
    if shape is None:
        raise ModelError(
            "its attribute kernel_shape is missing and the shape of its weight is not known",
            where=f"node {node.name!r} ({node.op_type})",
            remedy="Export the model with the kernel's shape written out",
        )
    return tuple(shape)


def _pads(
    how: str,
    node: onnx.NodeProto,
    shapes: Mapping[str, tuple[int, ...]],
    kernel: list[int],
    strides: list[int],
    dilations: list[int],
) -> list[int]:
    """Return the padding for ONNX's ``auto_pad`` (ONNX operators, Conv: ``SAME_UPPER`` and the like)."""
    if how == "VALID":
        return [0] * (2 * len(kernel))
    shape = shapes.get(node.input[0])
    if shape is None:
        raise ModelError(
            f"its padding {how} depends on a shape that is not known",
            where=f"node {node.name!r} ({node.op_type})",
            remedy="Export the model with explicit pads and a fixed size of its input",
        )
    before, behind = auto_pad.explicit_pads(how, shape[2:], kernel, strides, dilations)
    return before + behind


def _set(node: onnx.NodeProto, values: Mapping[str, Any]) -> None:
    import onnx

    kept = [one for one in node.attribute if one.name not in values and one.name != "auto_pad"]
    del node.attribute[:]
    node.attribute.extend(kept)
    node.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in values.items())


def pooled_by_convolution(model: onnx.ModelProto) -> list[str]:
    """Replace averages by convolutions of each channel with ones, scaled by the number of taps, in place: FINN has no
    average that ends in a threshold. Those with padding or rounded-up ends stay as they are.

    Returns:
        Names of the nodes that were replaced; the convolutions have the same names.
    """
    import onnx

    shapes = shapes_of(model)
    replaced = []
    for index, node in enumerate(model.graph.node):
        shape = shapes.get(node.input[0]) if node.op_type in _AVERAGES else None
        if shape is None or len(shape) != 4:
            continue
        have = attributes_of(node)
        kernel = list(have.get("kernel_shape", shape[2:]))
        strides = list(have.get("strides", kernel if node.op_type == "GlobalAveragePool" else [1, 1]))
        if any(have.get("pads", [0])) or have.get("ceil_mode", 0) or (have.get("auto_pad") or b"NOTSET") != b"NOTSET":
            continue
        weight = _ones(model, node.name, channels=shape[1], kernel=kernel)
        layer = onnx.helper.make_node(
            "Conv",
            [node.input[0], weight],
            list(node.output),
            name=node.name,
            kernel_shape=kernel,
            strides=strides,
            pads=[0, 0, 0, 0],
            dilations=[1, 1],
            group=shape[1],
        )
        model.graph.node[index].CopyFrom(layer)
        replaced.append(node.name)
    _sort(model)
    return replaced


def _ones(model: onnx.ModelProto, name: str, *, channels: int, kernel: list[int]) -> str:
    """Return a quantized weight of ones (2 bits, signed), whose scale is one divided by the number of taps."""
    import onnx

    taps = math.prod(kernel)
    scale = np.float32(1.0) / np.float32(taps)
    values = {
        "ones": np.full((channels, 1, *kernel), scale, dtype=np.float32),
        "scale": np.asarray(scale),
        "zero": np.asarray(0.0, dtype=np.float32),
        "bits": np.asarray(2.0, dtype=np.float32),
    }
    names = {part: f"{name}_average_{part}" for part in values}
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.ascontiguousarray(value).reshape(value.shape), names[part])
        for part, value in values.items()
    )
    node = onnx.helper.make_node(
        "Quant",
        [names[part] for part in ("ones", "scale", "zero", "bits")],
        [f"{name}_average_weight"],
        name=f"{name}_average_weight",
        domain=qonnx_nodes.DOMAIN,
        signed=1,
        narrow=1,
        rounding_mode="ROUND",
    )
    model.graph.node.append(node)
    return str(node.output[0])


def quantized_before_moves(model: onnx.ModelProto) -> None:
    """Move a quantizer with one scale before a preceding node that only moves values (Flatten, Reshape), in place: FINN
    absorbs what precedes a threshold, but not through a change of shape."""
    wiring = Wiring(model)
    shapes = shapes_of(model)
    types = {value.name: value for value in model.graph.value_info}
    moved = True
    while moved:
        moved = False
        for node in model.graph.node:
            if not qonnx_nodes.is_ours(node) or node.op_type not in ("Quant", "IntQuant", "BipolarQuant"):
                continue
            before = wiring.maker.get(node.input[0])
            if before is None or before.op_type not in _MOVES or not _one_scale(node, wiring):
                continue
            alone = len(wiring.readers[node.input[0]]) == 1 and node.input[0] not in wiring.outputs
            if not alone or before.input[0] not in shapes or node.output[0] in wiring.outputs:
                continue
            source, middle, last = before.input[0], node.input[0], node.output[0]
            # source -> move -> middle -> quant -> last becomes source -> quant -> middle -> move -> last
            node.input[0], node.output[0] = source, middle
            before.input[0], before.output[0] = middle, last
            if middle in types:
                types[middle].type.CopyFrom(_type_like(model, source, shapes))
            shapes[last], shapes[middle] = shapes.get(middle, ()), shapes[source]
            wiring = Wiring(model)
            moved = True
            break
    _sort(model)


def _type_like(model: onnx.ModelProto, name: str, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    import onnx

    value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, list(shapes[name]))
    return value.type


def _one_scale(node: onnx.NodeProto, wiring: Wiring) -> bool:
    values = [wiring.constant(name) for name in node.input[1:]]
    return all(value is not None and value.size == 1 for value in values)


def without_identities(model: onnx.ModelProto) -> None:
    """Remove Identity and Dropout, in place, except one that connects the graph's input directly to an output."""
    gone: dict[str, str] = {}
    outputs = {value.name for value in model.graph.output}
    kept = []
    for node in model.graph.node:
        source = gone.get(node.input[0], node.input[0]) if node.input else ""
        if node.op_type in ("Identity", "Dropout") and node.output[0] not in outputs:
            gone[node.output[0]] = source
            continue
        kept.append(node)
    for node in kept:
        for index, name in enumerate(node.input):
            node.input[index] = gone.get(name, name)
    del model.graph.node[:]
    model.graph.node.extend(kept)
    dead_code.remove_dead_nodes(model)


def _sort(model: onnx.ModelProto) -> None:
    nodes = topological_order.sort_nodes(list(model.graph.node))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
