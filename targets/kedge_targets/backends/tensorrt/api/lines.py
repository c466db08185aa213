"""The three lines of TensorRT that Kedge supports, each with its differences.

The flags of a network and its builder are in the bundle's recipe, including that 11 has neither ``EXPLICIT_BATCH`` nor
``INT8`` and ``FP16`` (its networks are strongly typed).
"""

from __future__ import annotations

from typing import Any

from kedge_targets.backends.tensorrt.api import base
from kedge_targets.backends.tensorrt.api.base import ProgressCallback


class Api8(base.Api):
    """TensorRT 8.6 (JetPack 6.0)."""

    def watch(self, config: Any, on_progress: ProgressCallback) -> None:
        """Report that it builds, since 8.6 has no progress monitor."""
        on_progress("build", 0, 0)

    def node_of(self, error: Any) -> str:
        """Return the node's number; 8.6 has no name for it."""
        return str(error.node())


class Api10(base.Api):
    """TensorRT 10 (JetPack 6.1 and later)."""

    def watch(self, config: Any, on_progress: ProgressCallback) -> None:
        """Attach the progress monitor, which exists since 10.0."""
        config.progress_monitor = base.monitor(self.library, on_progress)

    def node_of(self, error: Any) -> str:
        """Return the node's name in the ONNX file."""
        return repr(error.node_name())


class Api11(Api10):
    """TensorRT 11 (JetPack 7.2), and TensorRT for RTX, which has the same builder."""
