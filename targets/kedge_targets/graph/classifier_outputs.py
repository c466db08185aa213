"""Handles classifier outputs as exported by scikit-learn, XGBoost and LightGBM: scores behind a ZipMap, string
labels."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

_CLASSES = "kedge.classes"


def to_tensors(model: onnx.ModelProto) -> None:
    """Let every output be a tensor of numbers, in place: a ZipMap (a list of dictionaries) gives its scores as they
    are, and a label as text goes where another output has the scores. Names of classes stay: :func:`class_names`."""
    names = _found(model)
    _without_zipmaps(model)
    _without_texts(model)
    if names:
        entry = next((one for one in model.metadata_props if one.key == _CLASSES), None)
        (entry or model.metadata_props.add(key=_CLASSES)).value = json.dumps(names)


def class_names(model: onnx.ModelProto) -> tuple[str, ...]:
    """Return the class names in the graph, in the order of its scores; empty if it holds none, or only the numbers from
    0."""
    stored = next((one.value for one in model.metadata_props if one.key == _CLASSES), "")
    return tuple(json.loads(stored)) if stored else tuple(_found(model))


def _found(model: onnx.ModelProto) -> list[str]:
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "classlabels_strings" and attribute.strings:
                return [text.decode("utf-8", "replace") for text in attribute.strings]
            if attribute.name in ("classlabels_ints", "classlabels_int64s") and attribute.ints:
                numbers = list(attribute.ints)
                return [] if numbers == list(range(len(numbers))) else [str(number) for number in numbers]
    return []


def _without_zipmaps(model: onnx.ModelProto) -> None:
    import onnx

    outputs = {value.name: value for value in model.graph.output}
    for node in model.graph.node:
        if node.op_type != "ZipMap" or node.output[0] not in outputs:
            continue
        made = onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, [None, None])
        outputs[node.output[0]].CopyFrom(made)
        node.op_type, node.domain = "Identity", ""
        del node.attribute[:]
    if any(node.op_type == "Identity" for node in model.graph.node) and not any(
        opset.domain == "" for opset in model.opset_import
    ):
        model.opset_import.append(onnx.helper.make_opsetid("", 17))


def _without_texts(model: onnx.ModelProto) -> None:
    import onnx

    texts = [value for value in model.graph.output if value.type.tensor_type.elem_type == onnx.TensorProto.STRING]
    if texts and len(texts) < len(model.graph.output):
        for value in texts:
            model.graph.output.remove(value)
