"""A step may name a teacher: another model that the user's learns from, and that judges everything instead of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge.compiler.validation import ValidatedRequest
from kedge.evaluation import model as modelling
from kedge.evaluation.model import Model, Teacher
from kedge.importing import api as importing
from kedge.importing.worker_messages import Imported
from kedge.report.html import readable_bytes
from kedge.training import teacher_graph
from kedge_targets.worker import Worker

Array = npt.NDArray[Any]


def with_teacher(
    model: Model, asked: ValidatedRequest, arrays: Mapping[str, Array], worker: Worker, *, scratch: Path
) -> tuple[Model, tuple[str, ...]]:
    """Return the model with the teacher as its reference, and a note on it; the model itself if no step names one.

    Args:
        arrays: calibration samples, for a teacher whose file does not tell its inputs.

    Raises:
        ConfigError: the teacher's inputs or outputs are not the model's.
        ModelError: see :func:`kedge.importing.api.import_model`.
    """
    source = asked.teacher
    if source is None:
        return model, ()
    folder = scratch / "teacher"
    folder.mkdir()
    prepared = _prepared(source, asked, arrays, worker, folder)
    made = folder / "matched.onnx"
    worker.call(
        "kedge.training.teacher_graph:match",
        teacher_graph.MatchRequest(
            graph=prepared.reference,
            made=str(made),
            inputs=model.inputs,
            outputs=model.outputs,
            where=f"teacher {source}",
        ),
        teacher_graph.MatchAnswer,
        deadline=asked.options.deadline,
    )
    teacher = Teacher(file=Path(source).name, digest=prepared.digest, size_bytes=prepared.size_bytes)
    judged = replace(
        model,
        reference=str(made),
        teacher=teacher,
        fixed_batch=model.fixed_batch or prepared.fixed_batch,
        activation_bytes=max(model.activation_bytes, prepared.activation_bytes),
    )
    return judged, (
        f"the float model that judges is the teacher {teacher.file} ({teacher.digest[:19]}, "
        f"{readable_bytes(teacher.size_bytes)}); the model that was given has {readable_bytes(model.size_bytes)}",
    )


def _prepared(source: str, asked: ValidatedRequest, arrays: Mapping[str, Array], worker: Worker, folder: Path) -> Model:
    """Import the teacher, of whatever kind it is, and check it as a model is checked."""
    options = asked.options
    examples = {
        name: np.asarray(array[:2], dtype=np.float32 if options.preprocess or array.dtype.kind == "f" else None)
        for name, array in arrays.items()
        if name != "label"
    }
    imported = worker.call(
        importing.TASK,
        importing.request(
            source, workdir=folder, inputs=examples, batch=options.batch, trust_pickle=options.trust_pickle
        ),
        Imported,
        deadline=options.deadline,
    )
    return worker.call(
        "kedge.evaluation.model:prepare",
        modelling.PrepareRequest(
            model=imported.graph,
            graph=str(folder / "prepared.onnx"),
            digest=imported.source_digest,
            size_bytes=imported.size_bytes,
        ),
        Model,
        deadline=options.deadline,
    )
