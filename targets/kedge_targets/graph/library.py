"""Imports ONNX Runtime without telemetry, and turns its errors into Kedge's.

From 1.31 on ``import onnxruntime`` by itself writes an identifier and a data base to ``~/.cache/Microsoft`` and opens a
connection; ``disable_telemetry_events`` comes too late for that. The library looks for a variable in the environment
as it is loaded.
"""

from __future__ import annotations

import os
import re
from typing import Any

from kedge_protocol.errors import MissingDependencyError, ModelError, UnsupportedOperatorError
from kedge_protocol.packages import HOST, pip_install


def load(extra: str = "compile", *, of: str = HOST) -> Any:
    """Import the package ``onnxruntime``.

    Args:
        extra: what the user should install where it is missing.
        of: the distribution whose extra it is.

    Raises:
        MissingDependencyError: it is not installed.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            f"ONNX Runtime cannot be loaded: {error}",
            remedy=f"Install it with {pip_install(extra, of=of)}",
        ) from error
    return onnxruntime


def reason_of(error: Exception) -> str:
    """Return ONNX Runtime's message without the code and the source location."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", " ".join(str(error).split()))
    return re.sub(r"^\S+\.(?:cc|h):\d+ .*?(?=[A-Z][a-z]+ )", "", text)[:400]


def try_to_load(raw: bytes, settings: Any, *, where: str) -> None:
    """Load a model with ONNX Runtime, and write the optimized model if the settings ask for it; raises as
    :func:`opened`."""
    opened(raw, settings, where=where)


def opened(raw: bytes, settings: Any, *, where: str) -> Any:
    """Open a session of a model on the CPU.

    Raises:
        UnsupportedOperatorError: it has no kernel for an operator; names the operator and its node.
        ModelError: it refuses the model, with its own reason.
    """
    onnxruntime = load()
    try:
        return onnxruntime.InferenceSession(raw, settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library's errors have no common base but Exception
        reason = reason_of(error)
        if found := re.search(r"implementation for (\w+)\(\d+\) node with name '([^']*)'", reason):
            raise UnsupportedOperatorError(
                f"ONNX Runtime's CPU kernels lack operator {found[1]!r} for these types",
                where=f"{where}: node {found[2]!r}",
                remedy="Export the model with another operator in its place",
            ) from error
        raise ModelError(f"ONNX Runtime refuses it: {reason}", where=where, remedy="Export it again") from error
