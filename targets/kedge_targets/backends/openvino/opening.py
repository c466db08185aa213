"""Opens a graph in OpenVINO, in the form that the plan asks for: prepared for NNCF, in float, or, of a quantized file,
with the file's own scales."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedge_protocol.errors import UnsupportedOperatorError
from kedge_targets.backends.openvino import devices, float_check, nncf_preparation, reading
from kedge_targets.backends.openvino.older_reductions import with_axes_of_onnx
from kedge_targets.backends.openvino.older_softmax import with_softmax_of_onnx
from kedge_targets.backends.openvino.wrong_fusions import without_wrong_fusions
from kedge_targets.compiler_template import LoweringJob
from kedge_targets.contract import Calibration
from kedge_targets.graph import (
    batch,
    canonicalization,
    concat_scales,
    dequantization,
    integer_operators,
    model_reader,
    model_writer,
    plan_layers,
    qdq_insertion,
)
from kedge_targets.numerics import Precision

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True, kw_only=True)
class Ready:
    """The graph in the form that OpenVINO takes.

    Attributes:
        read: as stored in the file.
        trained: with the sizes that the device requires to be fixed.
        graph: with a fixed batch and prepared for NNCF, if needed.
        rounded: whether it is already quantized and left as it is.
    """

    read: onnx.ModelProto
    trained: onnx.ModelProto
    graph: onnx.ModelProto
    rounded: bool
    notes: tuple[str, ...]


def opened(
    openvino: Any, read: onnx.ModelProto, trained: onnx.ModelProto, job: LoweringJob, wanted: devices.Settings
) -> tuple[Ready, Path, Any]:
    """Return the graph, its file and OpenVINO's model of it. A quantized file is kept where OpenVINO computes what it
    says, and else taken in float."""
    given = _ready(read, trained, job, wanted)
    if given.rounded:
        graph = _written(given, job)
        with contextlib.suppress(UnsupportedOperatorError):
            model = reading.read(openvino, graph, given.graph, folded=False)
            if float_check.holds(openvino, model, given.graph, job.calibration):
                return given, graph, model
        given = _ready(read, trained, job, wanted, keep=False)
    graph = _written(given, job)
    model = reading.read(openvino, graph, given.graph)
    float_check.check(openvino, model, given.graph, job.calibration)
    return given, graph, model


def _written(given: Ready, job: LoweringJob) -> Path:
    if given.graph is given.read:
        return job.graph
    graph = job.workdir / "prepared.onnx"
    model_writer.save(given.graph, graph)
    return graph


def _ready(
    read: onnx.ModelProto, trained: onnx.ModelProto, job: LoweringJob, wanted: devices.Settings, *, keep: bool = True
) -> Ready:
    given = trained
    if not wanted.on_cpu and batch.size(given) is None:
        # An NPU takes fixed shapes only, and a GPU compiles each size anew.
        given = batch.fix_batch(given, 1)
    integers = plan_layers.leading(job.plan) is Precision.INT8
    given, taken = _taken(canonicalization.without_doubles(given), job.calibration, keep=keep)
    given = without_wrong_fusions(with_axes_of_onnx(with_softmax_of_onnx(given)))
    # In float, too, a file that rounds stays as small as it is; only float16 stores it anew.
    kept = plan_layers.leading(job.plan) in (Precision.INT8, Precision.FLOAT32)
    rounded = kept and qdq_insertion.has_qdq(given)
    if integers and not rounded:
        given = nncf_preparation.prepare_for_nncf(nncf_preparation.with_norms_of_onnx(given))
        given = model_reader.infer_shapes(given, where=job.graph.name)
        given = concat_scales.even_out(given, job.calibration)
    elif rounded:
        given = nncf_preparation.prepare_pairs(model_reader.infer_shapes(given, where=job.graph.name))
    else:
        given = nncf_preparation.with_averages_of_onnx(nncf_preparation.with_norms_of_onnx(given))
    return Ready(read=read, trained=trained, graph=given, rounded=rounded, notes=taken)


def _taken(given: onnx.ModelProto, calibration: Calibration, *, keep: bool) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """Return a quantized file with its scales in pairs; in float where it has none but for its weights, or where they
    are not to be kept. Other files stay as they are."""
    made = integer_operators.in_pairs(given)
    if keep and (made is given or qdq_insertion.has_qdq(made)):
        return made, ()
    made, notes = dequantization.restored(made, calibration)
    return model_reader.infer_shapes(made, where="the quantized model"), notes
