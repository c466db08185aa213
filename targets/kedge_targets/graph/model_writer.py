"""Writes a graph reproducibly, with the lowest possible IR version and without anything that a runtime does not
need."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kedge_protocol.errors import ModelError, StorageError
from kedge_targets.graph import model_reader, nodes

if TYPE_CHECKING:
    import onnx


def save(model: onnx.ModelProto, path: Path) -> None:
    """Write a model with the lowest IR version that its opsets allow, so that older runtimes take it too.

    Raises:
        ModelError: over protobuf's 2 GiB.
        StorageError: the disk is full or not writable.
    """
    import onnx

    needed = onnx.helper.find_min_ir_version_for(list(model.opset_import), ignore_unknown=True)
    if model.functions:
        needed = max(needed, 8)
    model.ir_version = max(needed, model_reader.LOWEST_IR_VERSION)
    try:
        raw = model.SerializeToString(deterministic=True)
    except ValueError as error:
        raise ModelError(f"the graph is too large to write: {error}", where=str(path)) from error
    try:
        path.write_bytes(raw)
    except OSError as error:
        raise StorageError(f"cannot be written: {error.strerror}", where=str(path)) from error


def strip(model: onnx.ModelProto, *, keep_shapes: bool = False) -> None:
    """Take away what no runtime reads, in place: inferred shapes (unless they are to be kept), documentation and
    metadata (exporters write stack traces and paths there), opsets that nothing uses."""
    used = {"" if domain == nodes.DEFAULT_DOMAIN else domain for domain, _ in nodes.operators(model)}
    used |= {function.domain for function in model.functions}
    kept = [opset for opset in model.opset_import if opset.domain in used or opset.domain in ("", nodes.DEFAULT_DOMAIN)]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    model.doc_string = ""
    del model.metadata_props[:]
    for graph in nodes.graphs(model.graph):
        graph.doc_string = ""
        if not keep_shapes:
            del graph.value_info[:]
        del graph.metadata_props[:]
        del graph.quantization_annotation[:]
        for part in (*graph.node, *graph.initializer, *graph.input, *graph.output):
            part.doc_string = ""
            del part.metadata_props[:]
    for function in model.functions:
        function.doc_string = ""
        del function.metadata_props[:]
        del function.value_info[:]
        for node in function.node:
            node.doc_string = ""
            del node.metadata_props[:]
