"""Saves models given as Python objects to a file that the worker's child process reads.

This is the only place where a framework runs in the caller's own process: the object lives there, the user has already
imported that framework, and a module cannot be passed to another process without pickling its code.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kedge.importing import sklearn_model
from kedge_protocol.errors import ModelError

_KINDS = (
    "a path, 'module:factory', a torch.nn.Module, a torch.export.ExportedProgram, a keras.Model or a fitted estimator "
    "of scikit-learn"
)


def save_object(model: object, example: Mapping[str, Any] | None, folder: Path) -> Path:
    """Save a model; its weights, its mode (training or not) and its device stay as they are.

    Args:
        model: a ``torch.nn.Module`` (traced with a free batch if possible), a
            ``torch.export.ExportedProgram``, a ``keras.Model`` or a fitted estimator of scikit-learn.
        example: argument name → samples as the module takes them, batch axis first; only for a module.
        folder: the folder to write ``model.pt2``, ``model.keras`` or ``model.joblib`` to.

    Raises:
        ModelError: the object is of another kind, the module cannot be traced, or there is no example.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Whoever has such an object has imported its framework.
    keras, torch = sys.modules.get("keras"), sys.modules.get("torch")
    if keras is not None and isinstance(model, keras.Model):
        path = folder / "model.keras"
        try:
            model.save(str(path))
        except Exception as error:
            raise _cannot("keras.Model", error) from error
        return path
    if torch is not None and isinstance(model, torch.export.ExportedProgram):
        return _written(model, folder)
    if torch is not None and isinstance(model, torch.nn.Module):
        return _written(_traced(model, example or {}), folder)
    if sklearn_model.is_estimator(model):
        return _dumped(model, folder)
    raise ModelError(f"{type(model).__name__} is no model that can be read", where="model", remedy=f"Give {_KINDS}")


def _traced(module: Any, example: Mapping[str, Any]) -> Any:
    import copy

    from kedge.importing import factory, pytorch

    where = type(module).__name__
    if any(tensor.device.type != "cpu" for tensor in (*module.parameters(), *module.buffers())):
        module = copy.deepcopy(module).cpu()
    with pytorch.evaluation_mode(module):
        taken = factory.example_from_samples(module, example, where)
        return pytorch.export_program(module, taken, batch=None, where=where).program


def _written(program: Any, folder: Path) -> Path:
    import torch

    path = folder / "model.pt2"  # the file's name is part of its bytes
    try:
        torch.export.save(program, str(path))
    except Exception as error:
        raise _cannot("exported program", error) from error
    return path


def _dumped(model: object, folder: Path) -> Path:
    path = folder / "model.joblib"
    try:
        import joblib

        joblib.dump(model, str(path))
    except Exception as error:
        raise _cannot(type(model).__name__, error) from error
    return path


def _cannot(what: str, error: Exception) -> ModelError:
    return ModelError(
        f"the {what} cannot be saved: {' '.join(str(error).split())[:400]}",
        where="model",
        remedy="Export it to ONNX and give that file",
    )
