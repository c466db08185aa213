"""Prepares a graph for NNCF and for what OpenVINO's plugins make of integers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge_targets.backends.openvino import integer_reductions
from kedge_targets.graph import canonicalization, opsets
from kedge_targets.graph.names import Names
from kedge_targets.graph.wiring import Wiring

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]

_AXES_AS_INPUT = 13
"""The opset from which on Squeeze takes its axes as an input."""
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
    _put_weights_behind(made)
    _give_biases(made)
    _give_products_biases(made)
    _compute_integers_rightly(made)
    return made


def prepare_pairs(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return an equivalent copy of a quantized graph without what the plugin computes wrongly in integers."""
    import onnx

    made = onnx.ModelProto()
    made.CopyFrom(model)
    _convolve_averages(made)
    _compute_integers_rightly(made)
    return made


def _compute_integers_rightly(model: onnx.ModelProto) -> None:
    _free_leading_axes(model)
    _keep_gathered_axes(model)
    integer_reductions.with_four_axes(model, but=of_norms(model))


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


def _put_weights_behind(model: onnx.ModelProto) -> None:
    """Write a product of a constant matrix with an activation as one of the turned activation with the turned matrix:
    the CPU plugin (2026.4) refuses scales for each row of a first factor ("any_of(scale.size(), OC, 1U)")."""
    from onnx import helper, numpy_helper

    wiring, names = Wiring(model), Names(model)
    values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in values}
    made: list[onnx.NodeProto] = []
    for node in model.graph.node:
        weight = wiring.constant(node.input[0]) if node.op_type == "MatMul" else None
        rank = 0 if weight is None or wiring.constant(node.input[1]) is not None else ranks.get(node.input[1], 0)
        if weight is None or weight.dtype != np.float32 or weight.ndim != 2 or rank < 2:
            made.append(node)
            continue
        turned, matrix, product = (names.fresh(f"{node.name}_{what}") for what in ("turned", "matrix", "product"))
        order = [*range(rank - 2), rank - 1, rank - 2]
        model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(weight.T), matrix))
        made.append(helper.make_node("Transpose", [node.input[1]], [turned], name=names.fresh_node(turned), perm=order))
        made.append(helper.make_node("MatMul", [turned, matrix], [product], name=node.name))
        made.append(
            helper.make_node("Transpose", [product], list(node.output), name=names.fresh_node(product), perm=order)
        )
    del model.graph.node[:]
    model.graph.node.extend(made)


def _free_leading_axes(model: onnx.ModelProto) -> None:
    """Write -1 for the 0 that keeps the first axis of a reshape. Where the CPU plugin (2026.4) moves a scale behind a
    reshape it takes the 0 for a size."""
    from onnx import numpy_helper

    wiring, names = Wiring(model), Names(model)
    for node in model.graph.node:
        wanted = wiring.constant(node.input[1]) if node.op_type == "Reshape" else None
        if wanted is None or "allowzero" in _attributes(node) or wanted.ndim != 1 or not wanted.size:
            continue
        if wanted[0] == 0 and (wanted[1:] > 0).all():
            name = names.fresh(f"{node.input[1]}_free")
            model.graph.initializer.append(numpy_helper.from_array(np.array([-1, *wanted[1:]], np.int64), name))
            node.input[1] = name


def _keep_gathered_axes(model: onnx.ModelProto) -> None:
    """Take one of an axis (a class token, a step) as a row of length one, and drop the axis behind it. The CPU plugin
    (2026.4) moves a scale behind a Gather without taking the axis off the scale, which then adds it to the answer."""
    from onnx import helper, numpy_helper

    wiring, names = Wiring(model), Names(model)
    by_input = opsets.version(model) >= _AXES_AS_INPUT
    made: list[onnx.NodeProto] = []
    for node in model.graph.node:
        made.append(node)
        place = wiring.constant(node.input[1]) if node.op_type == "Gather" else None
        if place is None or place.ndim or wiring.constant(node.input[0]) is not None:
            continue
        answer, row, place_of_row = node.output[0], names.fresh(f"{node.output[0]}_row"), names.fresh(node.input[1])
        axis = int(_attributes(node).get("axis", 0))
        model.graph.initializer.append(numpy_helper.from_array(place.reshape(1), place_of_row))
        node.input[1], node.output[0] = place_of_row, row
        if by_input:
            axes = names.fresh(f"{row}_axis")
            model.graph.initializer.append(numpy_helper.from_array(np.array([axis]), axes))
            made.append(helper.make_node("Squeeze", [row, axes], [answer], name=names.fresh_node(row)))
        else:
            made.append(helper.make_node("Squeeze", [row], [answer], name=names.fresh_node(row), axes=[axis]))
    del model.graph.node[:]
    model.graph.node.extend(made)


def with_norms_of_onnx(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which the bias of each LRN is 1, with the factor that this takes out behind it; the given model
    if it has no other. With the usual beta of 0.75 the CPU plugin (2026.4) does not compute another bias."""
    if all(node.op_type != "LRN" or _attributes(node).get("bias", 1.0) == 1.0 for node in model.graph.node):
        return model
    import onnx
    from onnx import helper, numpy_helper

    made = onnx.ModelProto()
    made.CopyFrom(model)
    names, arranged = Names(made), list[onnx.NodeProto]()
    for node in made.graph.node:
        arranged.append(node)
        how = _attributes(node)
        bias = how.get("bias", 1.0)
        if node.op_type != "LRN" or bias == 1.0:
            continue
        answer, normed = node.output[0], names.fresh(f"{node.output[0]}_normed")
        factor = names.fresh(f"{node.name}_factor")
        node.output[0] = normed
        # x / (k + a s)^b = k^-b x / (1 + a/k s)^b (ONNX operators, LRN)
        del node.attribute[:]
        scaled = {**how, "alpha": how.get("alpha", 1e-4) / bias, "bias": 1.0}
        node.attribute.extend(helper.make_attribute(name, value) for name, value in scaled.items())
        value = np.full(1, bias ** -how.get("beta", 0.75), np.float32)
        made.graph.initializer.append(numpy_helper.from_array(value, factor))
        arranged.append(helper.make_node("Mul", [normed, factor], [answer], name=names.fresh_node(factor)))
    del made.graph.node[:]
    made.graph.node.extend(arranged)
    return made


def with_averages_of_onnx(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy whose averages OpenVINO computes as ONNX says; the given model if it has no other. Of a window
    that ``ceil_mode`` lets reach beyond the padding, OpenVINO (2026.4) counts all places, ONNX those within it."""
    if not any(_counts_border(_attributes(node)) and _attributes(node).get("ceil_mode") for node in _averages(model)):
        return model
    import onnx

    made = onnx.ModelProto()
    made.CopyFrom(model)
    _convolve_averages(made, every=False)
    return made


def _convolve_averages(model: onnx.ModelProto, *, every: bool = True) -> None:
    """Replace each AveragePool with padding by a convolution. In integers the plugin counts the border of an
    AveragePool (``count_include_pad``) as the integer 0, which stands for the lowest value. A preceding Pad is fused
    into it again; a convolution with equal weights is not.

    Args:
        every: replace those without ``ceil_mode`` too.
    """
    from onnx import numpy_helper

    names = Names(model)
    values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    shapes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values}
    behind: dict[str, onnx.NodeProto] = {}
    for node in _averages(model):
        how, dims = _attributes(node), shapes.get(node.input[0], [])
        ceil = bool(how.get("ceil_mode", 0))
        if not _counts_border(how) or not (ceil or every) or len(dims) < 3 or dims[1] < 1:
            continue
        pads, factor = list(how["pads"]), None
        if ceil:
            found = _reaching(how, dims[2:], shapes.get(node.output[0], [])[2:])
            if found is None:
                continue
            pads, factor = found
        weight, answer = names.fresh(f"{node.name}_weight"), node.output[0]
        value = np.full((dims[1], 1, *how["kernel_shape"]), 1.0 / np.prod(how["kernel_shape"]), np.float32)
        model.graph.initializer.append(numpy_helper.from_array(value, weight))
        if factor is not None:
            behind[node.name] = _scaled(model, factor, answer, names)
            answer = behind[node.name].input[0]
        _convolve(node, weight, answer, {**how, "pads": pads, "group": dims[1]})
    made = [one for node in model.graph.node for one in (node, behind.get(node.name)) if one is not None]
    del model.graph.node[:]
    model.graph.node.extend(made)


def _averages(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == "AveragePool"]


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    from onnx import helper

    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _counts_border(how: Mapping[str, Any]) -> bool:
    return bool(how.get("count_include_pad", 0)) and any(how.get("pads", ()))


def _convolve(node: onnx.NodeProto, weight: str, answer: str, how: Mapping[str, Any]) -> None:
    from onnx import helper

    kept = {name: how[name] for name in ("kernel_shape", "pads", "strides", "dilations", "group") if name in how}
    node.CopyFrom(helper.make_node("Conv", [node.input[0], weight], [answer], name=node.name, **kept))


def _scaled(model: onnx.ModelProto, factor: Array, answer: str, names: Names) -> onnx.NodeProto:
    """Return the node that multiplies what it reads by constants and gives ``answer``."""
    from onnx import helper, numpy_helper

    stored, before = names.fresh(f"{answer}_share"), names.fresh(f"{answer}_average")
    model.graph.initializer.append(numpy_helper.from_array(factor, stored))
    return helper.make_node("Mul", [before, stored], [answer], name=names.fresh_node(stored))


def _reaching(how: Mapping[str, Any], sizes: list[int], windows: list[int]) -> tuple[list[int], Array | None] | None:
    """Return the padding that every window of an average with ``ceil_mode`` fits into, and the factors (1 x 1 x the
    windows) of what an average over whole windows is then multiplied by, None if all are 1; None if sizes are unknown.
    """
    rank = len(sizes)
    if (
        len(windows) != rank
        or min((*sizes, *windows), default=0) < 1
        or any(one != 1 for one in how.get("dilations", ()))
    ):
        return None
    pads, factor = list(how["pads"]), np.ones((1, 1), np.float32)
    for axis, (size, count) in enumerate(zip(sizes, windows, strict=True)):
        kernel, stride = how["kernel_shape"][axis], how.get("strides", [1] * rank)[axis]
        end = size + pads[axis] + pads[rank + axis]
        starts = np.arange(count) * stride
        pads[rank + axis] += max(0, int(starts[-1]) + kernel - end)
        shares = kernel / (np.minimum(starts + kernel, end) - starts).astype(np.float32)
        factor = factor[..., None] * shares
    return pads, None if (factor == 1).all() else factor.astype(np.float32)


_TOWARDS_DIVISORS = frozenset({
    "Abs", "Add", "Cast", "Clip", "Div", "Exp", "Identity", "Max", "Mul", "Pow", "Reciprocal", "ReduceL1", "ReduceL2",
    "ReduceMean", "ReduceSum", "ReduceSumSquare", "Sqrt", "Sub",
})  # fmt: skip


def divisors(model: onnx.ModelProto) -> list[str]:
    """Return the names of the nodes that compute a divisor, and of those that divide by it. A divisor near 0 has an
    error of its own size in integers, and the quotient has none of its digits; other backends divide in float."""
    wiring = Wiring(model)
    found: dict[str, None] = {}
    for node in model.graph.node:
        by = {"Div": 1, "Reciprocal": 0}.get(node.op_type)
        if by is None or wiring.constant(node.input[by]) is not None:
            continue
        found[node.name] = None
        pending = [node.input[by]]
        while pending:
            maker = wiring.maker.get(pending.pop())
            if maker is not None and maker.op_type in _TOWARDS_DIVISORS and maker.name not in found:
                found[maker.name] = None
                pending += [name for name in maker.input if name]
    return list(found)


def of_norms(model: onnx.ModelProto) -> list[str]:
    """Return the names of the nodes that subtract a tensor's mean from it, and of those that take the mean of squares,
    as a norm that is written out does. In float the CPU plugin runs a norm as one operator; in integers (2026.4) it
    gives random results if the batch is large."""
    wiring = Wiring(model)
    found: list[str] = []
    for node in model.graph.node:
        if node.op_type != "ReduceMean":
            continue
        readers = [reader for reader, _ in wiring.readers[node.output[0]] if reader.op_type == "Sub"]
        if any(node.input[0] in reader.input for reader in readers):
            found += [node.name, *(reader.name for reader in readers)]
        maker = wiring.maker.get(node.input[0])
        if maker is not None and (maker.op_type == "Pow" or (maker.op_type == "Mul" and len(set(maker.input)) == 1)):
            found.append(node.name)
    return found


def regrouping(model: onnx.ModelProto) -> list[str]:
    """Return the names of the reshapes that make channels of parts of several others, with more axes than before: the
    CPU plugin (2026.4) fails to move the scales of a grouped convolution in front of one ("ReshapeTransformation")."""
    values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    shapes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values}
    found = []
    for node in model.graph.node:
        before, behind = (shapes.get(name, []) for name in (node.input[0], node.output[0])) if node.input else ([], [])
        if node.op_type != "Reshape" or not 1 < len(before) < len(behind):
            continue
        old, new = before[1], behind[1]
        if old > 0 and new > 0 and old % new and new % old:
            found.append(node.name)
    return found
