"""The three lines of TensorRT that Kedge knows, each in what it does its own way.

Which flags a network and its builder get stands in the bundle's recipe; that 11 has neither ``EXPLICIT_BATCH`` nor
``INT8`` and ``FP16`` (its networks are strongly typed) shows there.
"""

from __future__ import annotations

from typing import Any

from kedge_targets.backends.tensorrt.api import base
from kedge_targets.backends.tensorrt.api.base import ProgressCallback


class Api8(base.Api):
    """TensorRT 8.6 (JetPack 6.0)."""

    def watch(self, config: Any, on_progress: ProgressCallback) -> None:
        """8.6 has no progress monitor: that it builds is all there is to tell."""
        on_progress("build", 0, 0)

    def node_of(self, error: Any) -> str:
        """8.6 knows the node's number only."""
        return str(error.node())


class Api10(base.Api):
    """TensorRT 10 (JetPack 6.1 and later)."""

    def watch(self, config: Any, on_progress: ProgressCallback) -> None:
        """The progress monitor came with 10.0."""
        config.progress_monitor = base.monitor(self.library, on_progress)

    def node_of(self, error: Any) -> str:
        """The node's name in the ONNX file."""
        return repr(error.node_name())


class Api11(Api10):
    """TensorRT 11 (JetPack 7.2), and TensorRT for RTX, which has its builder."""
