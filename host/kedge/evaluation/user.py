"""The user's own metric: ``file.py:function``, ``function(outputs, inputs, labels) -> float``, higher is better."""

from __future__ import annotations

import importlib.util
import math
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.errors import ConfigError

Array = npt.NDArray[Any]
UserMetric = Callable[[Mapping[str, Array], Mapping[str, Array], Any], Any]

WHERE = "--metric"
"""Where errors of the user's own function are said to be."""


def is_file(text: str) -> bool:
    """Whether a reference names a file: what stands before its first colon that ends in ``.py`` is one."""
    return text.endswith(".py") or ".py:" in text


def check_reference(reference: str, where: str = WHERE) -> None:
    """Check the form ``file.py:function``, and that the file is there.

    Raises:
        ConfigError: it is not.
    """
    path, colon, name = reference.rpartition(":")
    if not colon or Path(path).suffix != ".py" or not name.isidentifier():
        raise ConfigError(f"{reference!r} cannot be read", where=where, remedy="Write it as file.py:function")
    if not Path(path).is_file():
        raise ConfigError(f"there is no file {path}", where=where)


def absolute(reference: str) -> str:
    """The same with the file's whole path: the worker may stand elsewhere."""
    path, _, name = reference.rpartition(":")
    return f"{Path(path).absolute()}:{name}"


def load(reference: str) -> UserMetric:
    """The user's function.

    Args:
        reference: ``path.py:function``.

    Raises:
        ConfigError: no such file or function, or the file cannot be imported.
    """
    check_reference(reference)
    path, _, name = reference.rpartition(":")
    file = Path(path)
    spec = importlib.util.spec_from_file_location(f"_kedge_metric_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} cannot be imported", where=WHERE)
    module = importlib.util.module_from_spec(spec)
    folder = str(file.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # its own helpers lie beside it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"{path} cannot be imported: {_said(error)}", where=WHERE) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{path} has no function {name!r}", where=WHERE)
    found: UserMetric = function
    return found


def call(
    function: UserMetric, outputs: Mapping[str, Array], inputs: Mapping[str, Array], labels: Any, *, name: str
) -> Array:
    """The function's answer: one finite number (shape ``()``), or one for each sample (shape N).

    Raises:
        ConfigError: it raises, or gives something else.
    """
    try:
        value = function(dict(outputs), dict(inputs), labels)
    except Exception as error:
        raise ConfigError(f"{name} raised {_said(error)}", where=WHERE) from error
    if isinstance(value, np.ndarray) and value.shape == (len(next(iter(outputs.values()))),):
        if value.dtype.kind in "fiub" and np.isfinite(value).all():
            return np.asarray(value, dtype=np.float64)
    elif isinstance(value, (int, float, np.integer, np.floating)) and math.isfinite(value):
        return np.asarray(float(value))
    raise ConfigError(
        f"{name} gave {value!r}, a finite number was expected", where=WHERE, remedy="Or one for each sample, an array"
    )


def _said(error: Exception) -> str:
    """An error of the user's code with its line."""
    frames = traceback.extract_tb(error.__traceback__)
    line = f" (line {frames[-1].lineno} of {Path(frames[-1].filename).name})" if frames else ""
    return f"{type(error).__name__}: {error}{line}"
