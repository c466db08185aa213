"""Reads ``.keras`` files with Keras 3 on PyTorch, so that no TensorFlow is needed.

Keras chooses its backend and writes its settings on import, so it is imported only here, in the worker's child process.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kedge_protocol.errors import MissingDependencyError, ModelError
from kedge_protocol.packages import pip_install

ENGINE = "torch"


def load() -> Any:
    """Import and return the package ``keras`` on PyTorch.

    Raises:
        MissingDependencyError: it is not installed, or was already imported with another backend.
    """
    if "keras" not in sys.modules:
        os.environ["KERAS_BACKEND"] = ENGINE
        # It writes its settings to the user's home as it is imported.
        os.environ.setdefault("KERAS_HOME", tempfile.mkdtemp(prefix="kedge-keras-"))
    try:
        import keras
    except ImportError as error:
        raise MissingDependencyError(
            f"reading .keras files needs Keras 3: {error}", remedy=f"Install it with {pip_install('keras')}"
        ) from error
    if keras.backend.backend() != ENGINE:
        raise MissingDependencyError(
            f"Keras was imported with {keras.backend.backend()} before",
            remedy=f"Set KERAS_BACKEND={ENGINE} before keras is imported, or save the model as .keras and give that",
        )
    return keras


def read(path: Path) -> Any:
    """Return the model in a ``.keras`` file, for inference.

    Raises:
        ModelError: the file is damaged, names unknown classes, or has a lambda, which would run code from the file.
        MissingDependencyError: see :func:`load`.
    """
    keras = load()
    try:
        model = keras.saving.load_model(str(path), compile=False, safe_mode=True)
    except Exception as error:
        text = " ".join(str(error).split())[:400]
        raise ModelError(
            f"Keras cannot load it: {text}",
            where=str(path),
            remedy="Save it as .keras with Keras 3 (model.save), of Keras's own layers; for layers of your own "
            "give the ONNX file that model.export(…, format='onnx') writes",
        ) from error
    if not getattr(model, "inputs", None):
        raise ModelError(
            "its inputs are not known",
            where=str(path),
            remedy="Begin it with keras.Input, or call it once before you save it",
        )
    return model


def module(model: Any) -> Any:
    """Return the model as a PyTorch module whose forward takes the inputs one by one."""
    import torch

    class Flat(torch.nn.Module):  # type: ignore[misc]
        """Passes several inputs on as one list, as Keras expects."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: Any) -> Any:
            return self.model(list(inputs) if len(inputs) > 1 else inputs[0])

    return Flat()


def names(model: Any) -> tuple[list[str], list[str]]:
    """Return the names of the model's inputs and outputs."""
    outputs = list(getattr(model, "output_names", None) or [])
    if len(outputs) != len(model.outputs):
        outputs = [tensor.name for tensor in model.outputs]
    return [tensor.name for tensor in model.inputs], outputs


def example(model: Any, samples: Mapping[str, Any]) -> list[Any]:
    """Return an array for each input: the user's samples if they fit, otherwise noise, or 0 and 1 for integers.

    An axis that Keras leaves free besides the batch gets a length of 8.
    """
    rng = np.random.default_rng(0)
    found = []
    for tensor in model.inputs:
        shape = (2, *(8 if axis is None else int(axis) for axis in tensor.shape[1:]))
        dtype = np.dtype("float32" if "float" in str(tensor.dtype) else str(tensor.dtype))
        given = samples.get(tensor.name)
        if given is None and len(model.inputs) == 1 and len(samples) == 1:
            given = next(iter(samples.values()))
        if given is not None and given.ndim == len(shape):
            with contextlib.suppress(TypeError, ValueError):
                found.append(given.astype(dtype))
                continue
        noise = rng.standard_normal(shape) if dtype.kind == "f" else rng.integers(0, 2, shape)
        found.append(noise.astype(dtype))
    return found


def free_axes(model: Any) -> list[dict[int, str]]:
    """Return the named free axes of each input, without the batch."""
    return [
        {at: f"{tensor.name}_{at}" for at, axis in enumerate(tensor.shape) if axis is None and at > 0}
        for tensor in model.inputs
    ]


def tools() -> dict[str, str]:
    """Return the versions of the packages that read the model."""
    return {"keras": importlib.metadata.version("keras")}
