"""Runs graphs with ONNX Runtime during pruning: unoptimized by default, on one thread."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from kedge_targets.graph import library

if TYPE_CHECKING:
    import onnx


def session(model: onnx.ModelProto, *, where: str, outputs: Iterable[str] = (), optimized: bool = False) -> Any:
    """Open a session of a model.

    Args:
        outputs: tensors to return as well.
        optimized: let ONNX Runtime optimize the graph first, which takes a while and pays off for many runs.

    Raises:
        UnsupportedOperatorError, ModelError: see :func:`kedge_targets.graph.library.opened`.
    """
    import onnx

    onnxruntime = library.load()
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    settings.intra_op_num_threads = 1
    level = onnxruntime.GraphOptimizationLevel
    settings.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    have = {value.name for value in model.graph.output}
    extra = [name for name in outputs if name not in have]
    if extra:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in extra)
        model = copy
    return library.opened(model.SerializeToString(), settings, where=where)
