"""The importer's entry point: turns a model of any kind that Kedge reads into an ONNX graph."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge.importing import model_kinds, objects
from kedge.importing.worker_messages import Imported, ImportRequest
from kedge_protocol.errors import ConfigError
from kedge_targets.worker import Worker

Array = npt.NDArray[Any]

TASK = "kedge.importing.worker_tasks:import_model"
"""The task for :meth:`kedge_targets.worker.Worker.call`; takes the request made by :func:`request` and returns
:class:`Imported`."""

_SAMPLES = 2
_SAMPLES_OF_TEXTS = 64
"""Texts cost little, and what differs shows in few of them (letters with accents)."""


def rows_kept(inputs: Mapping[str, Array]) -> int:
    """Return how many samples the worker gets to compare on."""
    return _SAMPLES_OF_TEXTS if any(array.dtype.kind == "U" for array in inputs.values()) else _SAMPLES


def request(
    source: str | Path | object,
    *,
    workdir: Path,
    inputs: Mapping[str, Array] | None = None,
    batch: int | None = None,
    trust_pickle: bool = False,
) -> ImportRequest:
    """Make the request for the worker; runs in the parent, because only the parent knows the user's folder and objects.

    Args:
        source: a path, ``module:factory``, ``file.py:factory``, or an object
            (:func:`kedge.importing.objects.save_object`).
        workdir: an empty folder that outlives the import.
        inputs: name → preprocessed samples as the model takes them, batch axis first; the first ones are kept.
            Needed for a PyTorch module whose factory gives no example inputs; a single input may be named ``input``.
        batch, trust_pickle: as in :class:`ImportRequest`; an object passed by the caller is trusted.

    Raises:
        ConfigError: the batch is below 1.
        ModelError: the object cannot be saved.
    """
    if batch is not None and batch < 1:
        raise ConfigError(f"{batch} is no batch", where="batch", remedy="Give a number of samples from 1 up")
    if not isinstance(source, (str, Path)):
        source, trust_pickle = objects.save_object(source, inputs, workdir), True
    return ImportRequest(
        source=model_kinds.absolute(str(source)),
        workdir=str(workdir.absolute()),
        inputs={
            name: _kept(array[: rows_kept(inputs or {})], workdir / f"example-{at}.npy")
            for at, (name, array) in enumerate(name_inputs(inputs))
        },
        batch=batch,
        folder=str(Path.cwd()),
        trust_pickle=trust_pickle,
    )


def name_inputs(inputs: Mapping[str, Array] | None) -> list[tuple[str, Array]]:
    """Return the (name, array) pairs in order; empty if there are none."""
    return list((inputs or {}).items())


def _kept(array: Array, path: Path) -> str:
    np.save(path, np.ascontiguousarray(array), allow_pickle=False)
    return str(path.absolute())


def import_model(
    source: str | Path | object,
    *,
    workdir: Path,
    inputs: Mapping[str, Array] | None = None,
    batch: int | None = None,
    trust_pickle: bool = False,
    deadline: float = 3600.0,
) -> Imported:
    """Import a model in its own child process.

    Args:
        source, workdir, inputs, batch, trust_pickle: as in :func:`request`.
        deadline: seconds.

    Raises:
        ModelError: the file does not exist, its kind is not supported, the factory raises, or the graph does not
            compute what the model computes; the message says what to do.
        UnsupportedOperatorError: an operator has no counterpart in ONNX.
        MissingDependencyError: a package or toolchain that this kind needs is not installed.
        WorkerError: the framework crashed the child process.
    """
    with Worker(name="import") as worker:
        asked = request(source, workdir=workdir, inputs=inputs, batch=batch, trust_pickle=trust_pickle)
        return worker.call(TASK, asked, Imported, deadline=deadline)
