"""Prepares a graph for NNCF and for what OpenVINO's plugins make of integers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kedge_targets.graph import canonicalization
from kedge_targets.graph.names import Names
from kedge_targets.graph.wiring import Wiring

if TYPE_CHECKING:
    import onnx

_NEXT_TO_NOTHING = np.float32(1e-30)
"""Value of added biases: not 0, which is optimized away, nor subnormal, which may be flushed to 0."""


def prepare_for_nncf(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return an equivalent copy in a form that survives quantization: float32 for float64, a separate weight for each
    axis along which it is used, and a bias for each convolution and each product that two others read."""
    import onnx

    made = onnx.ModelProto()
    made.CopyFrom(model)
    canonicalization.convert_to_float32(made)
    _convolve_averages(made)
    canonicalization.fold_stored_weights(made)
    canonicalization.split_shared_weights(made)
    _give_biases(made)
    _give_products_biases(made)
    return made


def _give_biases(model: onnx.ModelProto) -> None:
    """Give a bias to convolutions that need one. The CPU plugin (2026.4) gives wrong results, often zeros, if two
    others read a convolution without bias in integers, as in ``x sigmoid(x)``; with a bias it does not."""
    from onnx import numpy_helper

    wiring, names = Wiring(model), Names(model)
    for node in model.graph.node:
        if node.op_type not in ("Conv", "ConvTranspose"):
            continue
        bias = wiring.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        weight = wiring.constant(node.input[1])
        given = len(node.input) > 2 and bool(node.input[2])
        if weight is None or weight.dtype != np.float32 or (given and (bias is None or bias.any())):
            continue
        groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
        channels = weight.shape[0] if node.op_type == "Conv" else weight.shape[1] * groups
        name = names.fresh(f"{node.name}_bias")
        model.graph.initializer.append(numpy_helper.from_array(np.full(channels, _NEXT_TO_NOTHING), name))
        del node.input[2:]
        node.input.append(name)


def _give_products_biases(model: onnx.ModelProto) -> None:
    """Do the same for matrix products, whose bias is a separate Add."""
    from onnx import helper, numpy_helper

    wiring, names = Wiring(model), Names(model)
    made: list[onnx.NodeProto] = []
    for node in model.graph.node:
        made.append(node)
        bare = node.op_type == "MatMul" or (node.op_type == "Gemm" and len(node.input) < 3)
        weight = wiring.constant(node.input[1]) if bare else None
        answer = node.output[0]
        if weight is None or weight.dtype != np.float32 or weight.ndim < 2:
            continue
        if len(wiring.readers[answer]) + (answer in wiring.outputs) < 2:
            continue
        product, bias = names.fresh(f"{answer}_product"), names.fresh(f"{node.name}_bias")
        model.graph.initializer.append(numpy_helper.from_array(np.full(1, _NEXT_TO_NOTHING), bias))
        node.output[0] = product
        made.append(helper.make_node("Add", [product, bias], [answer], name=names.fresh_node(bias)))
    del model.graph.node[:]
    model.graph.node.extend(made)


def _convolve_averages(model: onnx.ModelProto) -> None:
    """Replace each AveragePool with padding by a convolution. In integers the plugin counts the border of an
    AveragePool (``count_include_pad``) as the integer 0, which stands for the lowest value. A preceding Pad is fused
    into it again; a convolution with equal weights is not."""
    from onnx import helper, numpy_helper

    names = Names(model)
    shapes = {value.name: value.type.tensor_type.shape.dim for value in (*model.graph.value_info, *model.graph.input)}
    for node in model.graph.node:
        how = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        counted = node.op_type == "AveragePool" and how.get("count_include_pad", 0) and any(how.get("pads", ()))
        dims = list(shapes[node.input[0]]) if counted and node.input[0] in shapes else []
        if len(dims) < 3 or dims[1].dim_value < 1 or how.get("ceil_mode", 0):
            continue
        channels, kernel = dims[1].dim_value, how["kernel_shape"]
        weight = names.fresh(f"{node.name}_weight")
        value = np.full((channels, 1, *kernel), 1.0 / np.prod(kernel), np.float32)
        model.graph.initializer.append(numpy_helper.from_array(value, weight))
        kept = {name: how[name] for name in ("kernel_shape", "pads", "strides", "dilations") if name in how}
        node.CopyFrom(
            helper.make_node("Conv", [node.input[0], weight], list(node.output), name=node.name, group=channels, **kept)
        )


def centring(model: onnx.ModelProto) -> list[str]:
    """Return the names of the nodes that subtract a tensor's mean from it, as a norm that is written out does. In
    integers the CPU plugin (2026.4) gives random results for them if the batch is large."""
    wiring = Wiring(model)
    found: list[str] = []
    for node in model.graph.node:
        if node.op_type != "ReduceMean":
            continue
        readers = [reader for reader, _ in wiring.readers[node.output[0]] if reader.op_type == "Sub"]
        if any(node.input[0] in reader.input for reader in readers):
            found += [node.name, *(reader.name for reader in readers)]
    return found
