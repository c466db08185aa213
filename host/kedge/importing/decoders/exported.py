"""Reads a decoder that was exported to ONNX with past and present (by optimum, onnxruntime-genai and others), with the
tokenizer beside it."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kedge.importing import digests
from kedge.importing.decoders import text
from kedge.importing.decoders.text import TextFiles
from kedge_protocol.errors import ModelError
from kedge_targets.decoder.exported import KNOWN, PAST, PRESENT, ExportedSpec

_REMEDY = "Export it with inputs input_ids, attention_mask, position_ids, past_key_values.N.key and .value"


@dataclass(frozen=True, kw_only=True)
class ExportedDecoder:
    """An exported decoder.

    Attributes:
        path: its ``.onnx`` file.
        context: positions that its configuration names; None if there is none.
        architecture: the configuration's ``model_type``, or ``onnx``.
    """

    path: Path
    spec: ExportedSpec
    text: TextFiles
    context: int | None
    architecture: str
    source_digest: str
    size_bytes: int


def is_exported(path: Path) -> bool:
    """Return whether a file is such a decoder, by the names in it; it is not parsed."""
    if path.suffix.lower() != ".onnx" or not path.is_file() or not path.stat().st_size:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(f"{PAST}.0.key".encode()) >= 0


def read(path: Path) -> ExportedDecoder:
    """Read everything but the weights.

    Raises:
        ModelError: the file is damaged or of another form, or there is no tokenizer.json beside it.
    """
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's errors have no public base
        raise ModelError(f"is no ONNX file: {error}", where=str(path), remedy="Fetch it again") from error
    folder = path.parent
    if not (folder / "tokenizer.json").is_file() and (folder.parent / "tokenizer.json").is_file():
        # As on the hub: onnx/model.onnx below the tokenizer.
        folder = folder.parent
    config = text.optional(folder / "config.json")
    digest, size = digests.of_path(path)
    limit = config.get("max_position_embeddings") or config.get("n_positions")
    return ExportedDecoder(
        path=path,
        spec=_spec(model.graph, where=str(path)),
        text=text.of_folder(folder, config),
        context=limit if isinstance(limit, int) else None,
        architecture=str(config.get("model_type") or "onnx"),
        source_digest=digest,
        size_bytes=size + sum(one.stat().st_size for one in _beside(model, path)),
    )


def _beside(model: Any, path: Path) -> list[Path]:
    """Return the files with constants beside the graph."""
    names = {entry.value for one in model.graph.initializer for entry in one.external_data if entry.key == "location"}
    found = []
    for name in sorted(names):
        if Path(name).name != name or not (path.parent / name).is_file():
            raise ModelError(f"the file {name!r} beside it is missing", where=str(path), remedy="Fetch all files")
        found.append(path.parent / name)
    return found


def _spec(graph: Any, *, where: str) -> ExportedSpec:
    from onnx import TensorProto, helper

    stored = {one.name for one in graph.initializer}
    inputs = {one.name: one for one in graph.input if one.name not in stored}
    pasts = [name for name in inputs if name.startswith(f"{PAST}.")]
    if unknown := sorted(set(inputs) - set(pasts) - set(KNOWN)):
        raise ModelError(f"the input {unknown[0]!r} is not known", where=where, remedy=_REMEDY)
    outputs = {one.name: one for one in graph.output}
    wanted = ["logits", *(name.replace(PAST, PRESENT, 1) for name in pasts)]
    if missing := next((name for name in wanted if name not in outputs), None):
        raise ModelError(f"has no output {missing!r}", where=where, remedy=_REMEDY)
    first = inputs[f"{PAST}.0.key"]
    _, heads, _, size = _shape(first, 4, where)
    kind = first.type.tensor_type.elem_type
    if kind not in (TensorProto.FLOAT, TensorProto.FLOAT16):
        name = TensorProto.DataType.Name(kind)
        raise ModelError(
            f"the past is {name}, which is not taken", where=where, remedy="Export it in float32 or float16"
        )
    vocabulary = _shape(outputs["logits"], 3, where)[2]
    if not heads or not size or not vocabulary:
        raise ModelError("numbers of heads, channels or tokens are not fixed", where=where, remedy=_REMEDY)
    matrices = {one.name for one in graph.initializer if len(one.dims) == 2 and one.data_type == TensorProto.FLOAT}
    return ExportedSpec(
        vocabulary=vocabulary,
        layers=len(pasts) // 2,
        kv_heads=heads,
        head_size=size,
        itemsize=helper.tensor_dtype_to_np_dtype(kind).itemsize,
        roundable=any(node.op_type in ("MatMul", "Gemm") and node.input[1] in matrices for node in graph.node),
    )


def _shape(value: Any, rank: int, where: str) -> list[int]:
    found = [axis.dim_value for axis in value.type.tensor_type.shape.dim]
    if len(found) != rank:
        raise ModelError(f"{value.name!r} has {len(found)} axes, {rank} are wanted", where=where, remedy=_REMEDY)
    return found
