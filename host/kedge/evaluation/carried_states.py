"""Worker task: computes the states that the float model carries through sequences.

Calibration, sensitivity and golden vectors then see plain samples, each with the state that it meets; only the
evaluation carries the candidate's own (:func:`kedge.evaluation.worker_tasks.evaluate`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kedge.evaluation.dataset import Data
from kedge.evaluation.samples import NpyWriter, Samples, preprocess
from kedge_protocol.bundle.config import Preprocess
from kedge_protocol.errors import ModelError
from kedge_targets.graph.signature import TensorInfo
from kedge_targets.worker import Progress


@dataclass(frozen=True, kw_only=True)
class CarryRequest:
    """Request to run the float model over the data set, with zero states at the beginning of each sequence.

    Attributes:
        model: with its batch first.
        states: input → output.
        folder: an empty one.
    """

    model: str
    inputs: tuple[TensorInfo, ...]
    states: dict[str, str]
    data: Data
    preprocess: dict[str, Preprocess]
    folder: str


@dataclass(frozen=True, kw_only=True)
class CarryAnswer:
    """State input → ``.npy`` file with the state before each sample."""

    arrays: dict[str, str]


def carry(request: CarryRequest, progress: Progress) -> CarryAnswer:
    """A task of the worker.

    Raises:
        ModelError: ONNX Runtime refuses the model or fails in it, or a state's size is open.
        StorageError: no space for the states.
    """
    from kedge.evaluation import worker_tasks

    samples = Samples(request.data)
    plain = [spec for spec in request.inputs if spec.name not in request.states]
    start = {spec.name: zeros(spec) for spec in request.inputs if spec.name in request.states}
    outputs = list(request.states.values())
    run = worker_tasks.float_model(request.model)
    steps = request.data.steps or 1
    files = {name: Path(request.folder) / f"{at}.npy" for at, name in enumerate(start)}
    writers = {name: NpyWriter(path, samples.count) for name, path in files.items()}
    state = start
    with worker_tasks.on_disk():
        try:
            for at in range(samples.count):
                state = start if at % steps == 0 else state
                for name, value in state.items():
                    writers[name].add(value)
                feed = preprocess(samples.rows(at, at + 1), plain, request.preprocess)
                state = dict(zip(request.states, run(outputs, {**feed, **state}), strict=True))
                progress("states", at + 1, samples.count)
        finally:
            for writer in writers.values():
                writer.close()
    return CarryAnswer(arrays={name: str(path) for name, path in files.items()})


def zeros(spec: TensorInfo) -> np.ndarray:
    """The state before the first sample.

    Raises:
        ModelError: its size is open.
    """
    if None in spec.shape[1:]:
        raise ModelError(
            "its size is open, there is no first state of zeros",
            where=f"state {spec.name!r}",
            remedy="Give its values with the samples, or export the model with a fixed size",
        )
    return np.zeros((1, *(axis for axis in spec.shape[1:] if axis is not None)), np.dtype(spec.dtype))
