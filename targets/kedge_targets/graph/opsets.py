"""Reads a graph's opset, and raises or lowers it to another one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kedge_protocol.errors import ModelError
from kedge_targets.graph import model_reader, nodes

if TYPE_CHECKING:
    import onnx


def version(model: onnx.ModelProto) -> int:
    """Return the default domain's opset version; 0 if the model imports none."""
    found = [opset.version for opset in model.opset_import if opset.domain in ("", nodes.DEFAULT_DOMAIN)]
    return int(found[0]) if found else 0


def raise_opset(model: onnx.ModelProto, lowest: int, *, where: str) -> onnx.ModelProto:
    """Return the model in opset ``lowest``, or in its own if that is newer; the given model is not changed.

    Raises:
        ModelError: ONNX cannot convert it.
    """
    import onnx

    if version(model) >= lowest:
        return model
    try:
        converted = onnx.version_converter.convert_version(model, lowest)
    except Exception as error:  # the converter raises whatever its C++ half throws
        raise ModelError(
            f"opset {version(model)} cannot be converted to {lowest}: {error}",
            where=where,
            remedy=f"Export the model with opset {lowest} or newer",
        ) from error
    nodes.name_nodes(converted)
    return model_reader.infer_shapes(converted, where=where)


def lower_opset(model: onnx.ModelProto, highest: int) -> onnx.ModelProto | None:
    """Return the model in opset ``highest``, or in its own if that is older; None if its operators are not the same
    there. The given model is not changed."""
    import onnx

    if version(model) <= highest:
        return model
    try:
        converted = onnx.version_converter.convert_version(model, highest)
        onnx.checker.check_model(converted)
    except Exception:  # noqa: BLE001 -- the converter raises whatever its C++ half throws
        return None
    same = [node.op_type for node in converted.graph.node] == [node.op_type for node in model.graph.node]
    nodes.name_nodes(converted)
    return converted if same else None
