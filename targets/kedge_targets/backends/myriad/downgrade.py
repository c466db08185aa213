"""Converts a graph of today's OpenVINO to operation sets 1 to 7, which release 2021.4 reads, and to weights in FP16.

What the old release cannot express is refused with its layer and node. What it can express but its Myriad compiler does
not take is not known here: the compiler is queried (:mod:`kedge_targets.backends.myriad.toolchain_client`). It takes
some layers only in parts, or takes them but does not report them when queried; these are decomposed here.

Sources: OpenVINO's operation sets (opset1 to opset16), and for release 2021.4 "Supported Devices" (the column VPU) and
"VPU Plugins" (known limitations).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import numpy as np

from kedge_protocol.errors import UnsupportedOperatorError
from kedge_targets.backends.openvino import library

HIGHEST = 7
"""The last operation set of release 2021.4."""

_FIXED_EPSILON = 1e-9
"""Epsilon of MVN on a Myriad, whatever the graph says ("VPU Plugins", known layers limitations)."""

Rebuild = Callable[["_Operations", Any, Mapping[str, Any]], Any]
"""``(operations, operation, attributes)`` → the operation's new form, or None if the old sets have none."""


def downgrade(model: Any, nodes_of: Callable[[str], str]) -> list[str]:
    """Replace everything newer than opset 7, in place; layers keep their names.

    Args:
        model: an ``openvino.Model`` with fixed shapes.
        nodes_of: name of a layer → the node of the trained model's graph that it stems from, for messages.

    Returns:
        The types that were replaced, sorted (``Softmax``).

    Raises:
        UnsupportedOperatorError: a layer has no old form; names it and its node.
    """
    library.load()
    from openvino import opset1, opset3, opset7
    from openvino.utils.node_factory import NodeFactory

    # The package's own function for Interpolate of opset 4 makes that of opset 1.
    operations = _Operations(opset1, opset3, NodeFactory("opset4"), opset7)
    replaced = set()
    _drop_neutral(model)
    for operation in model.get_ordered_ops():
        kind = operation.get_type_name()
        if _opset(operation) <= HIGHEST and kind not in _ALWAYS:
            continue
        rebuild = _REBUILDS.get(kind)
        made = rebuild(operations, operation, operation.get_attributes()) if rebuild is not None else None
        if made is None:
            _refuse(operation, nodes_of, "has no form that the Myriad compiler (OpenVINO 2021.4) reads")
        _replace(operation, made)
        replaced.add(kind)
    model.validate_nodes_and_infer_types()
    for operation in model.get_ordered_ops():
        epsilon = operation.get_attributes().get("eps") if operation.get_type_name() == "MVN" else None
        if epsilon is not None and epsilon > 2 * _FIXED_EPSILON:
            _refuse(
                operation,
                nodes_of,
                f"normalizes with epsilon {epsilon:g}, and a Myriad has a fixed one of {_FIXED_EPSILON:g}",
            )
    return sorted(replaced)


def _refuse(operation: Any, nodes_of: Callable[[str], str], why: str) -> NoReturn:
    name = operation.get_friendly_name()
    raise UnsupportedOperatorError(
        f"layer {name!r} ({operation.get_type_name()}) {why}",
        where=f"node {nodes_of(name)!r}",
        remedy="Export the model with another operator in its place, or choose another target",
    )


class _Operations:
    """The builders of the old operation sets."""

    def __init__(self, one: Any, three: Any, four: Any, seven: Any) -> None:
        self.one, self.three, self.four, self.seven = one, three, four, seven


def _opset(operation: Any) -> int:
    """Return the operation set of a layer; 0 if it belongs to none (OpenVINO's internal operations, which never occur
    in a file)."""
    name = str(operation.get_type_info().version_id)
    return int(name.removeprefix("opset")) if name.startswith("opset") and name[5:].isdigit() else 0


def _replace(old: Any, new: Any) -> None:
    """Replace an old operation by a new one, which takes over its name, its tensors' names and its consumers."""
    new.set_friendly_name(old.get_friendly_name())
    for before, after in zip(old.outputs(), new.outputs(), strict=False):
        names = before.get_names()
        for consumer in list(before.get_target_inputs()):
            consumer.replace_source_output(after)
        after.add_names(names)


_NEUTRAL = {"Add": 0.0, "Multiply": 1.0}


def _drop_neutral(model: Any) -> None:
    """Remove additions of 0 and multiplications by 1 (from ONNX's Gemm): the old compiler removes them by itself, but
    then reports them as unsupported when queried."""
    for operation in model.get_ordered_ops():
        neutral = _NEUTRAL.get(operation.get_type_name())
        if neutral is None:
            continue
        for index in (0, 1):
            constant, value = _constant(operation, index), operation.input_value(1 - index)
            useless = constant is not None and bool(np.all(constant == neutral))
            if useless and value.get_shape() == operation.get_output_shape(0) and _is_layer(value.get_node()):
                names = operation.output(0).get_names()
                for consumer in list(operation.output(0).get_target_inputs()):
                    consumer.replace_source_output(value)
                value.add_names(names)
                break


def _is_layer(operation: Any) -> bool:
    return operation.get_type_name() not in ("Parameter", "Constant")


def _rank(operation: Any) -> int:
    return len(operation.input_value(0).get_partial_shape())


def _only_first_output(operation: Any) -> bool:
    return all(not output.get_target_inputs() for output in operation.outputs()[1:])


def _constant(operation: Any, index: int) -> Any | None:
    """Return an input's values if it is constant, else None."""
    node = operation.input_value(index).get_node()
    return node.get_data() if node.get_type_name() == "Constant" else None


def _softmax(ops: _Operations, operation: Any, attributes: Mapping[str, Any]) -> Any:
    # Opset 1 counts no axis from the end.
    return ops.one.softmax(operation.input_value(0), int(attributes["axis"]) % _rank(operation))


def _max_pool(ops: _Operations, operation: Any, attributes: Mapping[str, Any]) -> Any:
    if any(step != 1 for step in attributes["dilations"]) or not _only_first_output(operation):
        return None
    return _same_shape(
        operation,
        ops.one.max_pool(
            operation.input_value(0),
            attributes["strides"],
            attributes["pads_begin"],
            attributes["pads_end"],
            attributes["kernel"],
            _rounding(attributes),
            attributes["auto_pad"],
        ),
    )


def _avg_pool(ops: _Operations, operation: Any, attributes: Mapping[str, Any]) -> Any:
    if any(step != 1 for step in attributes.get("dilations", ())):
        return None
    return _same_shape(
        operation,
        ops.one.avg_pool(
            operation.input_value(0),
            attributes["strides"],
            attributes["pads_begin"],
            attributes["pads_end"],
            attributes["kernel"],
            bool(attributes["exclude-pad"]),
            _rounding(attributes),
            attributes["auto_pad"],
        ),
    )


def _rounding(attributes: Mapping[str, Any]) -> str:
    """Return the old name of a rounding type. ``ceil_torch`` equals ``ceil`` except for a last window that would lie in
    the padding; then the shape differs."""
    return str(attributes["rounding_type"]).removesuffix("_torch")


def _same_shape(operation: Any, made: Any) -> Any:
    return made if made.get_output_shape(0) == operation.get_output_shape(0) else None


def _gather(ops: _Operations, operation: Any, attributes: Mapping[str, Any]) -> Any:
    # Opset 8 counts indices from the end too.
    indices, axis = _constant(operation, 1), _constant(operation, 2)
    if indices is None or axis is None:
        return None
    length = operation.input_value(0).get_shape()[int(axis.item())]
    positive = np.where(indices < 0, indices + length, indices).astype(np.int64)
    batch_dims = int(attributes.get("batch_dims", 0))
    return ops.seven.gather(operation.input_value(0), ops.one.constant(positive), operation.input_value(2), batch_dims)


def _slice(ops: _Operations, operation: Any, attributes: Mapping[str, Any]) -> Any:
    shape = operation.input_value(0).get_shape()
    given = [
        values for index in range(1, operation.get_input_size()) if (values := _constant(operation, index)) is not None
    ]
    if len(given) != operation.get_input_size() - 1:
        return None
    starts, stops, steps = ([int(v) for v in np.atleast_1d(values)] for values in given[:3])
    axes = [int(v) for v in np.atleast_1d(given[3])] if len(given) > 3 else list(range(len(starts)))
    begin, end, stride = [0] * len(shape), [int(size) for size in shape], [1] * len(shape)
    for axis, start, stop, step in zip(axes, starts, stops, steps, strict=True):
        # Python's own rules, which both share, with what counts from the end turned into what does not.
        begin[axis], end[axis], stride[axis] = slice(start, stop, step).indices(shape[axis])
        if end[axis] < 0:  # backwards to the very first
            return None
    masks = [0] * len(shape)
    constants = (ops.one.constant(np.array(values, dtype=np.int64)) for values in (begin, end, stride))
    return ops.one.strided_slice(operation.input_value(0), *constants, masks, masks)


def _interpolate(ops: _Operations, operation: Any, attributes: Mapping[str, Any]) -> Any:
    if attributes["mode"] not in ("nearest", "linear", "linear_onnx", "cubic"):
        return None
    given = _constant(operation, 1)
    if given is None:
        return None
    axes = _constant(operation, 2) if operation.get_input_size() > 2 else np.arange(_rank(operation))
    if axes is None:
        return None
    before, after = operation.input_value(0).get_shape(), operation.output(0).get_shape()
    sizes = np.array([after[int(axis)] for axis in axes], dtype=np.int64)
    by_scale = attributes["shape_calculation_mode"] == "scales"
    scales = given if by_scale else np.array([after[int(axis)] / before[int(axis)] for axis in axes])
    inputs = [
        operation.input_value(0),
        ops.one.constant(sizes),
        ops.one.constant(np.asarray(scales, dtype=np.float32)),
        ops.one.constant(np.asarray(axes, dtype=np.int64)),
    ]
    return ops.four.create(
        "Interpolate", [value.output(0) if hasattr(value, "output") else value for value in inputs], dict(attributes)
    )


def _pad(ops: _Operations, operation: Any, attributes: Mapping[str, Any]) -> Any:
    # Opset 12 allows negative pads, which cut.
    before, after = _constant(operation, 1), _constant(operation, 2)
    if before is None or after is None or before.min() < 0 or after.min() < 0:
        return None
    value = operation.input_value(3) if operation.get_input_size() > 3 else None
    return ops.one.pad(
        operation.input_value(0), operation.input_value(1), operation.input_value(2), attributes["pad_mode"], value
    )


def _top_k(ops: _Operations, operation: Any, attributes: Mapping[str, Any]) -> Any:
    # Opset 11 may promise the order of equal values, opset 3 never does.
    return ops.three.topk(
        operation.input_value(0),
        operation.input_value(1),
        attributes["axis"],
        attributes["mode"],
        attributes["sort"],
        attributes["index_element_type"],
    )


def _soft_sign(ops: _Operations, operation: Any, attributes: Mapping[str, Any]) -> Any:
    name, value = operation.get_friendly_name(), operation.input_value(0)
    magnitude = ops.one.abs(value)
    magnitude.set_friendly_name(f"{name}/abs")
    divisor = ops.one.add(magnitude, ops.one.constant(np.float32(1.0)))
    divisor.set_friendly_name(f"{name}/sum")
    inverse = ops.one.power(divisor, ops.one.constant(np.float32(-1.0)))
    inverse.set_friendly_name(f"{name}/inverse")
    return ops.one.multiply(value, inverse)


def _reshape(ops: _Operations, operation: Any, attributes: Mapping[str, Any]) -> Any:
    """Reshape to the output's shape: with fixed shapes, operations that only rename axes are reshapes."""
    return ops.one.reshape(operation.input_value(0), _integers(ops, operation.get_output_shape(0)), False)


def _integers(ops: _Operations, values: Iterable[int]) -> Any:
    return ops.one.constant(np.array([int(value) for value in values], dtype=np.int64))


def _divide(ops: _Operations, operation: Any, attributes: Mapping[str, Any]) -> Any:
    divisor = _constant(operation, 1)
    if divisor is not None and divisor.dtype.kind == "f":
        return ops.one.multiply(operation.input_value(0), ops.one.constant((1.0 / divisor).astype(divisor.dtype)))
    if not operation.get_output_element_type(0).is_real():
        return ops.one.divide(operation.input_value(0), operation.input_value(1))
    inverse = ops.one.power(operation.input_value(1), ops.one.constant(np.float32(-1.0)))
    inverse.set_friendly_name(f"{operation.get_friendly_name()}/inverse")
    return ops.one.multiply(operation.input_value(0), inverse)


def _batch_norm(ops: _Operations, operation: Any, attributes: Mapping[str, Any]) -> Any:
    """Replace batch normalization by one multiplication and one addition per channel."""
    value = operation.input_value(0)
    given = [_constant(operation, index) for index in range(1, 5)]
    gamma, beta, mean, variance = (values for values in given if values is not None)
    factor = gamma / np.sqrt(variance + attributes["epsilon"])
    axes = (1, -1, *[1] * (_rank(operation) - 2))
    scaled = ops.one.multiply(value, ops.one.constant(factor.reshape(axes).astype(np.float32)))
    scaled.set_friendly_name(f"{operation.get_friendly_name()}/scaled")
    return ops.one.add(scaled, ops.one.constant((beta - mean * factor).reshape(axes).astype(np.float32)))


def _log_softmax(ops: _Operations, operation: Any, attributes: Mapping[str, Any]) -> Any:
    """Replace LogSoftmax by ``x - max - log(sum(exp(x - max)))``: the largest argument is 0, so FP16 holds every
    sum."""
    name = operation.get_friendly_name()
    axis = _integers(ops, [int(attributes["axis"]) % _rank(operation)])
    value = operation.input_value(0)
    largest = ops.one.reduce_max(value, axis, True)
    shifted = _difference(ops, value, largest, f"{name}/max")
    powers = ops.one.exp(shifted)
    total = ops.one.reduce_sum(powers, axis, True)
    logarithm = ops.one.log(total)
    for part, made in (("max", largest), ("shifted", shifted), ("exp", powers), ("sum", total), ("log", logarithm)):
        made.set_friendly_name(f"{name}/{part}")
    return _difference(ops, shifted, logarithm, f"{name}/log")


def _subtract(ops: _Operations, operation: Any, attributes: Mapping[str, Any]) -> Any:
    taken = _constant(operation, 1)
    if taken is not None and taken.dtype.kind == "f":
        return ops.one.add(operation.input_value(0), ops.one.constant(-taken))
    if not operation.get_output_element_type(0).is_real():
        return ops.one.subtract(operation.input_value(0), operation.input_value(1))
    return _difference(ops, operation.input_value(0), operation.input_value(1), operation.get_friendly_name())


def _difference(ops: _Operations, value: Any, taken: Any, name: str) -> Any:
    negative = ops.one.multiply(taken, ops.one.constant(np.float32(-1.0)))
    negative.set_friendly_name(f"{name}/negative")
    return ops.one.add(value, negative)


def _hard_sigmoid(ops: _Operations, operation: Any, attributes: Mapping[str, Any]) -> Any:
    name = operation.get_friendly_name()
    scaled = ops.one.multiply(operation.input_value(0), operation.input_value(1))
    scaled.set_friendly_name(f"{name}/scaled")
    moved = ops.one.add(scaled, operation.input_value(2))
    moved.set_friendly_name(f"{name}/moved")
    return ops.one.clamp(moved, 0.0, 1.0)


_REBUILDS: dict[str, Rebuild] = {
    "Softmax": _softmax,
    "MaxPool": _max_pool,
    "AvgPool": _avg_pool,
    "Gather": _gather,
    "Slice": _slice,
    "Interpolate": _interpolate,
    "Pad": _pad,
    "TopK": _top_k,
    "SoftSign": _soft_sign,
    "Squeeze": _reshape,
    "Identity": _reshape,
    "Divide": _divide,
    "BatchNormInference": _batch_norm,
    "LogSoftmax": _log_softmax,
    "Subtract": _subtract,
    "HardSigmoid": _hard_sigmoid,
}

_ALWAYS = frozenset({"Divide", "BatchNormInference", "LogSoftmax", "Subtract", "HardSigmoid"})
"""Operations that are replaced whatever their operation set: see above."""
