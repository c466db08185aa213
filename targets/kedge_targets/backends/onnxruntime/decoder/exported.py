"""Stores a decoder that was exported to ONNX with past and present: as it is, or with the weights of its products in
codes."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from kedge_protocol.bundle.config import RuntimeRequirement
from kedge_targets.backends.onnxruntime.decoder.writer import ACCURACY, MICROSOFT, stored_codes
from kedge_targets.decoder.contract import LoweredDecoder
from kedge_targets.decoder.exported import ExportedSpec
from kedge_targets.decoder.matrix import Codes
from kedge_targets.decoder.spec import Array

_SMALLEST = 1024
"""Bytes from which a constant is stored in the file beside the graph."""


def lowered(
    source: Path,
    spec: ExportedSpec,
    rounded: Callable[[Array], Codes] | None,
    *,
    workdir: Path,
    entry: str,
    data: str,
    minimum: str,
) -> LoweredDecoder:
    """Write the files; see :meth:`kedge_targets.decoder.contract.DecoderCompiler.lower_exported`."""
    model = onnx.load(str(source))
    if rounded is not None:
        _round_products(model, rounded)
    onnx.save_model(
        model,
        str(workdir / entry),
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=data,
        size_threshold=_SMALLEST,
    )
    files = {title: workdir / title for title in (entry, data) if (workdir / title).is_file()}
    return LoweredDecoder(
        files=files,
        entry=entry,
        runtimes=(RuntimeRequirement(distribution="onnxruntime", minimum=minimum),),
        tools={"onnx": metadata.version("onnx")},
        position_bytes=spec.position_bytes,
    )


def _round_products(model: onnx.ModelProto, rounded: Callable[[Array], Codes]) -> None:
    """Store the constant of each product ``x @ W`` and ``x @ W + b`` in codes."""
    graph = model.graph
    constants = {one.name: one for one in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    gone: set[str] = set()
    for node in graph.node:
        weight = _weight(node, constants)
        if weight is None:
            nodes.append(node)
            continue
        gone.add(node.input[1])
        nodes += _in_codes(node, rounded(weight), graph)
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input} | {one.name for one in graph.output}
    kept = [one for one in graph.initializer if one.name not in gone or one.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    if not any(one.domain == MICROSOFT for one in model.opset_import):
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))


def _weight(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> Array | None:
    """Return a product's constant as float32 [out, in]; None for what is no such product."""
    if node.op_type not in ("MatMul", "Gemm") or node.domain not in ("", "ai.onnx") or node.input[1] not in constants:
        return None
    found = constants[node.input[1]]
    if len(found.dims) != 2 or found.data_type != onnx.TensorProto.FLOAT:
        return None
    given = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    if given.get("transA") or given.get("alpha", 1.0) != 1.0 or given.get("beta", 1.0) != 1.0:
        return None
    weight = numpy_helper.to_array(found)
    return np.ascontiguousarray(weight if given.get("transB") else weight.T)


def _in_codes(node: onnx.NodeProto, matrix: Codes, graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    stem = node.output[0]
    inputs = [node.input[0]]
    for part, array in zip(("codes", "scales", "zeros"), stored_codes(matrix), strict=False):
        graph.initializer.append(numpy_helper.from_array(array, f"{stem}.{part}"))
        inputs.append(f"{stem}.{part}")
    biased = node.op_type == "Gemm" and len(node.input) > 2 and bool(node.input[2])
    made: dict[str, Any] = {"K": matrix.shape[1], "N": matrix.shape[0], "bits": matrix.bits, "block_size": matrix.group}
    output = f"{stem}.product" if biased else stem
    product = helper.make_node(
        "MatMulNBits", inputs, [output], f"{node.name}.codes", domain=MICROSOFT, accuracy_level=ACCURACY, **made
    )
    if not biased:
        return [product]
    return [product, helper.make_node("Add", [output, node.input[2]], [stem], f"{node.name}.bias")]
