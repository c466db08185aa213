"""Importing ONNX Runtime without its telemetry.

From 1.31 on ``import onnxruntime`` by itself writes an identifier and a data base to ``~/.cache/Microsoft`` and opens a
connection; ``disable_telemetry_events`` comes too late for that. The library looks for a variable in the environment
as it is loaded.
"""

from __future__ import annotations

import os
from typing import Any

from kedge_protocol.errors import MissingDependencyError


def load(extra: str = "compile") -> Any:
    """The package ``onnxruntime``.

    Args:
        extra: of Kedge, that the user should install where it is missing.

    Raises:
        MissingDependencyError: it is not installed.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            f"ONNX Runtime cannot be loaded: {error}",
            remedy=f'Install it with pip install "kedge[{extra}]"',
        ) from error
    return onnxruntime
