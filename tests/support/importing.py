"""Importing models in one worker that several tests share: PyTorch is loaded once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kedge.importing import api
from kedge.importing.worker_messages import Imported
from kedge_targets.graph import library
from kedge_targets.worker import Worker

Array = npt.NDArray[Any]


class Importer:
    """The worker, and a new folder for each import."""

    def __init__(self, worker: Worker, folder: Path) -> None:
        self._worker = worker
        self._folder = folder
        self._count = 0

    def __call__(
        self, source: object, inputs: Mapping[str, Array] | None = None, *, batch: int | None = None
    ) -> Imported:
        self._count += 1
        work = self._folder / str(self._count)
        work.mkdir()
        request = api.request(source, workdir=work, inputs=inputs, batch=batch)
        return self._worker.call(api.TASK, request, Imported, deadline=500)


@pytest.fixture(scope="module")
def importer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Importer]:
    with Worker(name="import") as worker:
        yield Importer(worker, tmp_path_factory.mktemp("import"))


def signature(graph: str) -> tuple[dict[str, list[int | str]], dict[str, list[int | str]]]:
    """Inputs and outputs of an ONNX file, each with its axes."""
    session = library.load().InferenceSession(graph, providers=["CPUExecutionProvider"])
    return (
        {one.name: one.shape for one in session.get_inputs()},
        {one.name: one.shape for one in session.get_outputs()},
    )


def answers(graph: str, feed: Mapping[str, Array]) -> list[Array]:
    """What ONNX Runtime answers."""
    session = library.load().InferenceSession(graph, providers=["CPUExecutionProvider"])
    found: list[Array] = session.run(None, dict(feed))
    return found


def close(mine: Array, theirs: Array) -> bool:
    """The same but for the order of sums."""
    return bool(mine.shape == theirs.shape and np.allclose(mine, theirs, rtol=1e-4, atol=1e-5))
