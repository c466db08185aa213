"""Prepares the user's model and data before the search: carries states, drops dead channels."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from kedge.evaluation import carried_states, preprocessing
from kedge.evaluation.dataset import Data, Scan
from kedge.evaluation.model import Model
from kedge.pruning import worker_task
from kedge.search.options import CompileOptions
from kedge.search.results import ProgressCallback
from kedge_protocol.errors import DatasetError
from kedge_targets.worker import Worker


def with_states(
    data: Data, model: Model, options: CompileOptions, worker: Worker, *, scratch: Path, on_progress: ProgressCallback
) -> Data:
    """Return the data set with the states that the user's files leave out, as the float model carries them.

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


def with_class_numbers(data: Data, model: Model, where: str, *, scratch: Path) -> Data:
    """Return a data set with class numbers as labels, converted from the model's class names if necessary.

    Raises:
        DatasetError: a label is a text, and the model has no class names, or not this one.
    """
    if data.label is None:
        return data
    labels = np.load(data.label, mmap_mode="r", allow_pickle=False)
    if labels.dtype.kind != "U":
        return data
    numbers = {name: number for number, name in enumerate(model.classes)}
    if unknown := sorted({str(one) for one in labels.ravel()} - set(numbers)):
        there = f"Its classes are {', '.join(model.classes)}" if numbers else "Give class numbers from 0 up"
        raise DatasetError(f"label {unknown[0]!r} is no class of the model", where=where, remedy=there)
    made = Path(tempfile.mkdtemp(prefix="labels-", dir=scratch)) / "label.npy"
    np.save(made, np.vectorize(lambda one: numbers[str(one)], otypes=[np.int64])(labels))
    return replace(data, label=str(made))


def without_dead_channels(
    model: Model, calibration: Data, options: CompileOptions, worker: Worker, *, scratch: Path
) -> tuple[Model, tuple[str, ...]]:
    """Return the model without dead channels, and a note on them; the float reference stays the user's own."""
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


_FEW = 8


def few(samples: int) -> list[str]:
    """Return a warning if there are too few calibration samples."""
    if samples >= _FEW:
        return []
    return [
        f"only {samples} calibration sample{'s' * (samples != 1)}: ranges of activations are guesswork and training "
        "has next to nothing to learn from; some hundred are usual"
    ]


def shared(calibration: Scan, evaluation: Scan) -> list[str]:
    """Return a warning if evaluation samples are among the calibration samples."""
    count = calibration.shared_with(evaluation)
    if not count:
        return []
    return [
        f"{count} of {len(evaluation.rows)} evaluation samples are among the calibration samples: "
        "the measured drop is too good"
    ]
