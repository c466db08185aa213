"""Running graphs with ONNX Runtime while pruning: as they are, on one thread."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from kedge_targets.graph import library

if TYPE_CHECKING:
    import onnx


def session(model: onnx.ModelProto, *, where: str, outputs: Iterable[str] = (), optimized: bool = False) -> Any:
    """A session of a model.

    Args:
        outputs: tensors that shall be outputs too.
        optimized: whether ONNX Runtime may rewrite the graph first, which takes a while and is worth it for many runs.

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
