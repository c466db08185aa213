"""Recognizes the nodes of QONNX, ONNX with few-bit operators (github.com/fastmachinelearning/qonnx)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

DOMAIN = "qonnx.custom_op.general"
VERSION = 1
DOMAINS = frozenset({DOMAIN, "onnx.brevitas", "finn.custom_op.general"})
"""The domain, and the ones that earlier exporters wrote."""
_STANDARD = frozenset({"", "ai.onnx"})
"""Domains in published files, including the standard domain, which has none of these operators."""
OPERATORS = frozenset({"Quant", "IntQuant", "BipolarQuant", "Trunc", "MultiThreshold"})


def is_ours(node: onnx.NodeProto) -> bool:
    """Return whether a node is one of :data:`OPERATORS`."""
    return node.domain in DOMAINS | _STANDARD and node.op_type in OPERATORS


def is_quantized(model: onnx.ModelProto) -> bool:
    """Return whether the main graph holds QONNX nodes."""
    return any(is_ours(node) for node in model.graph.node)


def normalize(model: onnx.ModelProto) -> None:
    """Give QONNX nodes the domain of the current specification, and add its import to the model, in place."""
    import onnx

    ours = [node for node in model.graph.node if is_ours(node)]
    if not ours:
        return
    for node in ours:
        node.domain = DOMAIN
    left = {node.domain for node in model.graph.node}
    version = max((opset.version for opset in model.opset_import if opset.domain in DOMAINS), default=VERSION)
    kept = [opset for opset in model.opset_import if opset.domain not in DOMAINS or opset.domain in left - {DOMAIN}]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, version))
