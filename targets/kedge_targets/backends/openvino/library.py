"""Imports OpenVINO without its telemetry.

``import openvino`` by itself (2026.4) writes an identifier and a counter to ``~/intel`` and sends an event over the
network, unless the user opted out or ``openvino_telemetry`` cannot be imported; in that case it uses a stub of its own.
The package is a dependency of OpenVINO, so it is hidden while OpenVINO is imported.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

from kedge_protocol.errors import MissingDependencyError
from kedge_protocol.packages import AGENT, pip_install

TELEMETRY = "openvino_telemetry"

_lock = threading.Lock()


@contextlib.contextmanager
def hidden(*packages: str) -> Iterator[None]:
    """Let imports of these packages fail inside the block, unless they were imported before."""
    with _lock:
        names = [name for name in packages if name not in sys.modules]
        for name in names:
            sys.modules[name] = None  # type: ignore[assignment]  # how Python marks a module that must not be found
        try:
            yield
        finally:
            for name in names:
                sys.modules.pop(name, None)


def load() -> Any:
    """Import the package ``openvino``.

    Raises:
        MissingDependencyError: OpenVINO is not installed.
    """
    try:
        if "openvino" in sys.modules:
            import openvino

            return openvino
        with hidden(TELEMETRY):
            import openvino
    except ImportError as error:
        raise MissingDependencyError(
            f"OpenVINO cannot be loaded: {error}", remedy=f"Install it with {pip_install('openvino', of=AGENT)}"
        ) from error
    return openvino


def reason_of(error: Exception) -> str:
    """Return OpenVINO's own message, without its source locations."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith(("Exception from", "Check '"))]
    return " ".join(told)[:400] or " ".join(str(error).split())[:400] or type(error).__name__
