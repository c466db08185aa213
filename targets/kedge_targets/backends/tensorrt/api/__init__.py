"""TensorRT's Python package in three release lines: 8.6 (JetPack 6.0), 10 (JetPack 6.1 and later), 11 (JetPack 7.2).

Differences are in ``lines``, everything else is in ``base``.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from kedge_protocol.errors import MissingDependencyError
from kedge_targets.backends.tensorrt.api.base import Api, Order
from kedge_targets.backends.tensorrt.api.lines import Api8, Api10, Api11

__all__ = ["Api", "Order", "load", "of"]

_LINES: dict[int, type[Api]] = {8: Api8, 10: Api10, 11: Api11}
_LEAST = (8, 6)


def of(library: Any) -> Api:
    """Return the adapter for a TensorRT package.

    Args:
        library: the imported package; TensorRT for RTX (``tensorrt_rtx``) counts as line 11, whose builder it has.

    Raises:
        MissingDependencyError: Kedge has no adapter for this version.
    """
    text = str(library.__version__)
    version = tuple(int(part) for part in text.split(".")[:2])
    line = _LINES[11] if "_rtx" in library.__name__ else _LINES.get(version[0])
    if line is None or (line is Api8 and version < _LEAST):
        raise MissingDependencyError(f"TensorRT {text} is not known", remedy="Known are 8.6, 10 and 11")
    return line(library)


@functools.cache
def load() -> Api:
    """Return the adapter for the installed TensorRT.

    Raises:
        MissingDependencyError: TensorRT is not installed, or cannot be loaded here.
    """
    try:
        library = importlib.import_module("tensorrt")
    except (ImportError, OSError) as error:  # OSError: NVIDIA's own libraries are missing
        raise MissingDependencyError(
            f"TensorRT cannot be loaded: {error}",
            remedy="On a Jetson install python3-libnvinfer, elsewhere pip install tensorrt",
        ) from error
    if not hasattr(library, "Builder"):
        raise MissingDependencyError("TensorRT cannot be loaded: the package 'tensorrt' is empty")
    return of(library)
