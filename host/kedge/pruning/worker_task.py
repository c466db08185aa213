"""The worker's task that removes dead channels before anything else is done with a model."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

from kedge.evaluation.dataset import Data
from kedge.evaluation.samples import PreprocessedSamples, Samples
from kedge.pruning import dead_channels
from kedge_protocol.bundle.config import Preprocess
from kedge_targets.graph.signature import TensorInfo
from kedge_targets.worker import Progress


@dataclass(frozen=True, kw_only=True)
class DropRequest:
    """A request to remove the dead channels from ``graph`` and to write the result to ``made``."""

    graph: str
    made: str
    inputs: tuple[TensorInfo, ...]
    calibration: Data
    preprocess: dict[str, Preprocess]


@dataclass(frozen=True, kw_only=True)
class DropAnswer:
    """What was removed; if ``note`` is empty, nothing was written.

    Attributes:
        attention, ends: those of the new graph, see :class:`kedge.evaluation.model.Model`.
    """

    note: str = ""
    attention: tuple[str, ...] = ()
    ends: tuple[tuple[str, ...], ...] = ()


def drop_dead(request: DropRequest, progress: Progress) -> DropAnswer:
    """Remove dead channels, as a task of the worker. A graph whose channels cannot be followed stays unchanged.

    Raises:
        StorageError: there is no space for the graph.
    """
    from kedge.evaluation import worker_tasks
    from kedge_protocol.errors import KedgeError
    from kedge_targets.graph import attention, ends, model_reader, model_writer

    model = model_reader.load(Path(request.graph))
    if not dead_channels.suspected(model):
        return DropAnswer()
    feeds = PreprocessedSamples(Samples(request.calibration), request.inputs, request.preprocess)
    try:
        dropped = dead_channels.drop(model, list(itertools.islice(feeds, dead_channels.SAMPLES)))
    except KedgeError:
        return DropAnswer()
    if not dropped.count:
        return DropAnswer()
    with worker_tasks.on_disk():
        model_writer.save(dropped.model, Path(request.made))
    return DropAnswer(
        note=dropped.note, attention=tuple(attention.products(dropped.model)), ends=tuple(ends.ends(dropped.model))
    )
