"""Canonicalizes graphs: rewrites equivalent forms to the one that later passes expect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge_targets.graph import dead_code, layers, nodes
from kedge_targets.graph.names import Names
from kedge_targets.graph.wiring import Wiring

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]

_PLAIN_OPSET = 17


def name_opsets_once(model: onnx.ModelProto) -> None:
    """Import each domain once, in place, with the highest version that is given: skl2onnx names the default domain
    twice, and its other name is ``ai.onnx``. A file of trees alone, as XGBoost's export, imports no default domain; it
    gets one, in which Kedge's own nodes are written."""
    versions: dict[str, int] = {}
    for opset in model.opset_import:
        domain = "" if opset.domain == "ai.onnx" else opset.domain
        versions[domain] = max(versions.get(domain, 0), opset.version)
    lacking = "" not in versions and all(node.domain not in ("", "ai.onnx") for node in model.graph.node)
    if len(versions) == len(model.opset_import) and not lacking:
        return
    if lacking:
        versions[""] = _PLAIN_OPSET
    from onnx import helper

    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(domain, version) for domain, version in versions.items())


def inline_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with its local functions inlined; the given model if it has none."""
    if not model.functions:
        return model
    from onnx import inliner

    made: onnx.ModelProto = inliner.inline_local_functions(model, convert_version=False)
    # A function of another opset than the model's is left where it is unless it is converted.
    return inliner.inline_local_functions(model, convert_version=True) if made.functions else made


def simplify_gemms(model: onnx.ModelProto) -> None:
    """Make the factors of each Gemm 1 and its bias a vector, in place, if its constants can absorb them."""
    wiring = Wiring(model)
    names = Names(model)
    changed = False
    for node in model.graph.node:
        if node.op_type == "Gemm" and node.domain in ("", nodes.DEFAULT_DOMAIN):
            changed |= _plain(model, node, wiring, names)
    if changed:
        dead_code.remove_dead_nodes(model)


def split_biases(model: onnx.ModelProto) -> None:
    """Move each Gemm bias that is no constant vector into a separate Add node, in place."""
    from onnx import helper

    wiring = Wiring(model)
    names = Names(model)
    made: list[onnx.NodeProto] = []
    for node in model.graph.node:
        made.append(node)
        bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
        value = wiring.constant(bias) if bias else None
        if not bias or (value is not None and value.ndim == 1):
            continue
        how = {attribute.name: attribute.f for attribute in node.attribute}
        del node.input[2:]
        answer, product = node.output[0], names.fresh(f"{node.output[0]}_product")
        node.output[0] = product
        if (beta := how.get("beta", 1.0)) != 1.0:
            scaled, factor = names.fresh(f"{bias}_scaled"), names.fresh(f"{bias}_factor")
            model.graph.initializer.append(_tensor(np.float32(beta), factor))
            made.append(helper.make_node("Mul", [bias, factor], [scaled], name=names.fresh_node(f"{node.name}_beta")))
            bias = scaled
        made.append(helper.make_node("Add", [product, bias], [answer], name=names.fresh_node(f"{node.name}_bias")))
        _drop(node, "beta")
    del model.graph.node[:]
    model.graph.node.extend(made)


def _plain(model: onnx.ModelProto, node: onnx.NodeProto, wiring: Wiring, names: Names) -> bool:
    how = {attribute.name: attribute for attribute in node.attribute}
    alpha = how["alpha"].f if "alpha" in how else 1.0
    beta = how["beta"].f if "beta" in how else 1.0
    changed = False
    weight = wiring.constant(node.input[1])
    if alpha != 1.0 and weight is not None and weight.dtype.kind == "f":
        node.input[1] = _stored(model, names, node.input[1], weight * weight.dtype.type(alpha))
        _drop(node, "alpha")
        changed = True
    bias = wiring.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    if bias is None or bias.dtype.kind != "f":
        return changed
    columns = 0 if weight is None or weight.ndim != 2 else weight.shape[0 if _turned(how) else 1]
    # One number, or one row: what is a column or a whole matrix is no vector of the columns'.
    row = columns > 0 and bias.shape != (columns,) and bias.shape in ((), (1,), (1, 1), (1, columns))
    if beta == 1.0 and not row:
        return changed
    value = bias * bias.dtype.type(beta)
    if row:
        value = np.broadcast_to(value.reshape(-1), (columns,))
    node.input[2] = _stored(model, names, node.input[2], value)
    _drop(node, "beta")
    return True


def _turned(how: dict[str, onnx.AttributeProto]) -> bool:
    return "transB" in how and bool(how["transB"].i)


def _drop(node: onnx.NodeProto, name: str) -> None:
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)


def _stored(model: onnx.ModelProto, names: Names, base: str, value: Array) -> str:
    name = names.fresh(f"{base}_plain")
    model.graph.initializer.append(_tensor(value, name))
    return name


def _tensor(value: Any, name: str) -> onnx.TensorProto:
    from onnx import numpy_helper

    return numpy_helper.from_array(np.asarray(value, order="C"), name)


def split_shared_weights(model: onnx.ModelProto) -> None:
    """Copy a weight that layers use along different axes for each axis, in place, since per-channel scales lie along
    one of them."""
    wiring, names = Wiring(model), Names(model)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    by_name = {node.name: node for node in model.graph.node}
    taken: dict[tuple[str, int | None], str] = {}
    first: dict[str, int | None] = {}
    for layer in layers.layers(model, wiring):
        name = layer.weight
        if name is None or name not in stored or first.setdefault(name, layer.axis) == layer.axis:
            continue
        key = (name, layer.axis)
        if key not in taken:
            taken[key] = names.fresh(f"{name}_along_{layer.axis}")
            copy = model.graph.initializer.add()
            copy.CopyFrom(stored[name])
            copy.name = taken[key]
        by_name[layer.name].input[layer.weight_input] = taken[key]


def is_half(model: onnx.ModelProto) -> bool:
    """Return whether a model stores mostly float16; it then runs in float16 rather than doubling in size."""
    from onnx import TensorProto

    sizes = {TensorProto.FLOAT16: 0, TensorProto.FLOAT: 0}
    for tensor in model.graph.initializer:
        if tensor.data_type in sizes:
            sizes[tensor.data_type] += 1 if not tensor.dims else int(np.prod(tensor.dims))
    return sizes[TensorProto.FLOAT16] > sizes[TensorProto.FLOAT]


def stores_small(model: onnx.ModelProto) -> bool:
    """Return whether most weights have fewer than 32 bits, which folding would enlarge."""
    from onnx import TensorProto

    small = {TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT8, TensorProto.UINT8}
    sizes = {True: 0, False: 0}
    for tensor in model.graph.initializer:
        if tensor.data_type in small or tensor.data_type == TensorProto.FLOAT:
            sizes[tensor.data_type in small] += 1 if not tensor.dims else int(np.prod(tensor.dims))
    return sizes[True] > sizes[False]


def convert_to_float32(model: onnx.ModelProto, *, ends: bool = False) -> None:
    """Let everything between inputs and outputs that is float64 or float16 be float32, in place. A model with operators
    outside ONNX's own, or with nested graphs, stays as it is.

    Args:
        ends: the inputs and outputs too.
    """
    from onnx import TensorProto

    for kind in (TensorProto.DOUBLE, TensorProto.FLOAT16):
        _convert(model, kind, ends=ends)


def without_doubles(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which all that is float64 is float32, inputs and outputs included; the given model if none of
    these is float64."""
    import onnx

    if all(
        value.type.tensor_type.elem_type != onnx.TensorProto.DOUBLE
        for value in (*model.graph.input, *model.graph.output)
    ):
        return model
    made = onnx.ModelProto()
    made.CopyFrom(model)
    _convert(made, onnx.TensorProto.DOUBLE, ends=True)
    return made


def in_float32(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy that is entirely float32, inputs and outputs included."""
    import onnx

    made = onnx.ModelProto()
    made.CopyFrom(model)
    convert_to_float32(made, ends=True)
    return made


def _convert(model: onnx.ModelProto, kind: int, *, ends: bool) -> None:
    from onnx import TensorProto, helper

    tensors = [tensor for tensor in model.graph.initializer if tensor.data_type == kind]
    values = [one for one in (*model.graph.input, *model.graph.output) if one.type.tensor_type.elem_type == kind]
    every = list(nodes.graphs(model.graph))
    plain = len(every) == 1 and all(node.domain in ("", nodes.DEFAULT_DOMAIN) for node in model.graph.node)
    casts = any(one.name == "to" and one.i == kind for node in model.graph.node for one in node.attribute)
    if not plain or not (tensors or values or casts):
        return
    if ends:
        for value in values:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    names = Names(model)
    for tensor in tensors:
        tensor.CopyFrom(_tensor(_array(tensor).astype(np.float32), tensor.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "value" and attribute.HasField("t") and attribute.t.data_type == kind:
                attribute.t.CopyFrom(_tensor(_array(attribute.t).astype(np.float32), attribute.t.name))
            if attribute.name in ("to", "dtype") and attribute.i == kind:
                attribute.i = TensorProto.FLOAT
    before, behind = [], []
    given = {value.name for value in model.graph.input}
    for value in model.graph.input:
        if value.type.tensor_type.elem_type == kind:
            single = names.fresh(f"{value.name}_single")
            _rename(model, value.name, single, inputs=True)
            before.append(helper.make_node("Cast", [value.name], [single], name=names.fresh_node(single), to=1))
    for value in model.graph.output:
        if value.type.tensor_type.elem_type == kind and value.name not in given:
            single = names.fresh(f"{value.name}_single")
            _rename(model, value.name, single, inputs=False)
            behind.append(helper.make_node("Cast", [single], [value.name], name=names.fresh_node(single), to=kind))
    arranged = [*before, *model.graph.node, *behind]
    del model.graph.node[:]
    model.graph.node.extend(arranged)
    # Shapes stay known: what comes behind asks for them.
    for value in model.graph.value_info:
        if value.type.tensor_type.elem_type == kind:
            value.type.tensor_type.elem_type = TensorProto.FLOAT


def _rename(model: onnx.ModelProto, old: str, new: str, *, inputs: bool) -> None:
    """Rename a tensor where nodes read it, and where they produce it unless it is an input's name."""
    for node in model.graph.node:
        for ends in (node.input,) if inputs else (node.input, node.output):
            for index, name in enumerate(ends):
                if name == old:
                    ends[index] = new


def _array(tensor: onnx.TensorProto) -> Array:
    from onnx import numpy_helper

    return np.asarray(numpy_helper.to_array(tensor))


_FOLDABLE = frozenset({"Cast", "DequantizeLinear", "Mul", "Add", "Sub", "Div", "Transpose", "Identity"})


def fold_stored_weights(model: onnx.ModelProto) -> None:
    """Store as float32, in place, what is computed of constants alone: weights that lie in the file as float16 behind a
    Cast, or as integers behind DequantizeLinear, or Cast and Mul."""
    from onnx.reference import ReferenceEvaluator

    wiring = Wiring(model)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    values: dict[str, Array] = {}

    def value(name: str) -> Array | None:
        if name not in values:
            found = _array(stored[name]) if name in stored else wiring.constant(name)
            if found is None:
                return None
            values[name] = found
        return values[name]

    gone = []
    for node in model.graph.node:
        inputs = [name for name in node.input if name]
        given = [value(name) for name in inputs] if node.op_type in _FOLDABLE and inputs else [None]
        if any(one is None for one in given) or node.output[0] in wiring.outputs:
            continue
        (made,) = ReferenceEvaluator(node).run(None, dict(zip(inputs, given, strict=True)))
        values[node.output[0]] = np.asarray(made)
        model.graph.initializer.append(_tensor(made, node.output[0]))
        gone.append(node)
    for node in gone:
        model.graph.node.remove(node)
    if gone:
        dead_code.remove_dead_nodes(model)
