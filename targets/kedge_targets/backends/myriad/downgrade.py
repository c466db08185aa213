"""Bringing a graph of today's OpenVINO down to opsets 1 to 7, which its release 2021.4 reads, and to weights in FP16.

What the old release cannot express is refused with its layer and node. What it can express and its Myriad compiler does
not take is not known here: the compiler is asked (:mod:`kedge_targets.backends.myriad.blobs`).

Source of the operators: OpenVINO's operation sets, https://docs.openvino.ai (opset1 to opset16).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kedge_protocol.errors import UnsupportedOperatorError
from kedge_targets.backends.openvino import library

HIGHEST = 7
"""The last operation set of release 2021.4."""

Rebuild = Callable[["_Operations", Any, Mapping[str, Any]], Any]
"""``(operations, operation, attributes)`` → the operation's new form, or None where the old sets have none."""


def downgrade(model: Any, nodes_of: Callable[[str], str]) -> list[str]:
    """Replace what is newer than opset 7, in place; layers keep their names.

    Args:
        model: an ``openvino.Model`` with fixed shapes.
        nodes_of: a layer's name → the node of the trained model's graph that it stems from, for messages.

    Returns:
        The types that were replaced, sorted (``Softmax``).

    Raises:
        UnsupportedOperatorError: names the layer and its node.
    """
    library.load()
    from openvino import opset1, opset3, opset4, opset7

    operations = _Operations(opset1, opset3, opset4, opset7)
    replaced = set()
    for operation in model.get_ordered_ops():
        kind = operation.get_type_name()
        if _opset(operation) <= HIGHEST:
            continue
        rebuild = _REBUILDS.get(kind)
        made = rebuild(operations, operation, operation.get_attributes()) if rebuild is not None else None
        if made is None:
            name = operation.get_friendly_name()
            raise UnsupportedOperatorError(
                f"layer {name!r} ({kind}) has no form that the Myriad compiler (OpenVINO 2021.4) reads",
                where=f"node {nodes_of(name)!r}",
                remedy="Export the model with another operator in its place, or choose another target",
            )
        _replace(operation, made)
        replaced.add(kind)
    model.validate_nodes_and_infer_types()
    return sorted(replaced)


class _Operations:
    """The builders of the old operation sets."""

    def __init__(self, one: Any, three: Any, four: Any, seven: Any) -> None:
        self.one, self.three, self.four, self.seven = one, three, four, seven


def _opset(operation: Any) -> int:
    """The operation set that a layer belongs to; 0 for none (OpenVINO's own, which are no part of a file)."""
    name = str(operation.get_type_info().version_id)
    return int(name.removeprefix("opset")) if name.startswith("opset") and name[5:].isdigit() else 0


def _replace(old: Any, new: Any) -> None:
    """Put a new operation in the place of an old one: its name, its tensors' names, its consumers."""
    new.set_friendly_name(old.get_friendly_name())
    for before, after in zip(old.outputs(), new.outputs(), strict=False):
        names = before.get_names()
        for consumer in list(before.get_target_inputs()):
            consumer.replace_source_output(after)
        after.add_names(names)


def _rank(operation: Any) -> int:
    return len(operation.input_value(0).get_partial_shape())


def _only_first_output(operation: Any) -> bool:
    return all(not output.get_target_inputs() for output in operation.outputs()[1:])


def _constant(operation: Any, index: int) -> Any | None:
    """An input's values where they are constant."""
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
    """``ceil_torch`` is ``ceil`` but for a last window that would lie in the padding: then the shape differs."""
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
    return ops.four.interpolate(
        operation.input_value(0),
        ops.one.constant(sizes),
        ops.one.constant(np.asarray(scales, dtype=np.float32)),
        attributes["mode"],
        attributes["shape_calculation_mode"],
        attributes["pads_begin"],
        attributes["pads_end"],
        attributes["coordinate_transformation_mode"],
        attributes["nearest_mode"],
        bool(attributes["antialias"]),
        float(attributes["cube_coeff"]),
        ops.one.constant(np.asarray(axes, dtype=np.int64)),
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
    value = operation.input_value(0)
    return ops.one.divide(value, ops.one.add(ops.one.abs(value), ops.one.constant(np.float32(1.0))))


def _reshape(ops: _Operations, operation: Any, attributes: Mapping[str, Any]) -> Any:
    """Shapes are fixed: what only renames axes is a reshape."""
    shape = np.array(operation.output(0).get_shape(), dtype=np.int64)
    return ops.one.reshape(operation.input_value(0), ops.one.constant(shape), False)


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
}
