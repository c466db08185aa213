"""What is done with the user's model and data before the search: states carried, dead channels dropped."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from kedge.evaluation import carried_states, preprocessing
from kedge.evaluation.dataset import Data
from kedge.evaluation.model import Model
from kedge.pruning import worker_task
from kedge.search.options import CompileOptions
from kedge.search.results import ProgressCallback
from kedge_targets.worker import Worker


def with_states(
    data: Data, model: Model, options: CompileOptions, worker: Worker, *, scratch: Path, on_progress: ProgressCallback
) -> Data:
    """A data set of a model with states that the user's files leave out: as the float model carries them.

    Raises:
        ModelError: see :func:`kedge.evaluation.carried_states.carry`.
    """
    if data.steps is None:
        return data
    answer = worker.call(
        "kedge.evaluation.carried_states:carry",
        carried_states.CarryRequest(
            model=model.reference,
            inputs=model.inputs,
            states=model.states,
            data=data,
            preprocess=preprocessing.parse(options.preprocess, model.inputs),
            folder=tempfile.mkdtemp(prefix="states-", dir=scratch),
        ),
        carried_states.CarryAnswer,
        deadline=options.deadline,
        on_progress=lambda what, done, total: on_progress("data", what, done, total),
    )
    return replace(data, arrays={**data.arrays, **answer.arrays})


def without_dead_channels(
    model: Model, calibration: Data, options: CompileOptions, worker: Worker, *, scratch: Path
) -> tuple[Model, tuple[str, ...]]:
    """The model without channels that carry nothing, and a note on them; the float reference stays the user's own."""
    if model.quantized:
        return model, ()
    made = scratch / "without-dead-channels.onnx"
    answer = worker.call(
        "kedge.pruning.worker_task:drop_dead",
        worker_task.DropRequest(
            graph=model.graph,
            made=str(made),
            inputs=model.inputs,
            calibration=calibration,
            preprocess=preprocessing.parse(options.preprocess, model.inputs),
        ),
        worker_task.DropAnswer,
        deadline=options.deadline,
    )
    if not answer.note:
        return model, ()
    return replace(model, graph=str(made), attention=answer.attention, ends=answer.ends), (answer.note,)
