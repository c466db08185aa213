"""What TensorRT's three release lines have in common.

Sources: NVIDIA's Python API reference of each line, and the bindings themselves (a test loads the bindings of 8.6.1,
10.3.0 and 11.4.0 and looks each name up).
"""

from __future__ import annotations

import abc
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kedge_protocol.errors import UnsupportedOperatorError, VerificationError

log = logging.getLogger("kedge.tensorrt")

ProgressCallback = Callable[[str, int, int], None]
"""Called with ``(what, done, total)``."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """The engine to build.

    Attributes:
        graph: the ONNX file.
        network_flags: members of ``NetworkDefinitionCreationFlag``.
        builder_flags: members of ``BuilderFlag``.
        workspace_bytes: scratch memory that a layer may use.
        shapes: input name → (minimum, optimum, maximum) shape, for inputs with dynamic dimensions.
    """

    graph: Path
    network_flags: tuple[str, ...]
    builder_flags: tuple[str, ...]
    workspace_bytes: int
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)


class Api(abc.ABC):
    """Adapter of one TensorRT package.

    Args:
        library: the imported package.
    """

    def __init__(self, library: Any) -> None:
        self.library = library
        self.version = str(library.__version__)
        self._words: list[str] = []
        self.logger = self._logger()
        library.init_libnvinfer_plugins(self.logger, "")

    @abc.abstractmethod
    def watch(self, config: Any, on_progress: ProgressCallback) -> None:
        """Make the builder report its progress."""

    @abc.abstractmethod
    def node_of(self, error: Any) -> str:
        """Return the node that a ``ParserError`` is about, for messages."""

    def build(self, order: Order, on_progress: ProgressCallback) -> bytes:
        """Parse an ONNX file and build an engine for this GPU.

        Raises:
            UnsupportedOperatorError: the parser refuses a node; names it.
            VerificationError: the builder returns nothing; with TensorRT's last messages.
        """
        trt = self.library
        self._words.clear()
        builder = trt.Builder(self.logger)
        network = builder.create_network(
            sum(1 << int(self._member("NetworkDefinitionCreationFlag", name)) for name in order.network_flags)
        )
        parser = trt.OnnxParser(network, self.logger)
        on_progress("parse", 0, 1)
        if not parser.parse(order.graph.read_bytes()):
            raise self._parse_error(parser, order)
        on_progress("parse", 1, 1)
        config = builder.create_builder_config()
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, order.workspace_bytes)
        for name in order.builder_flags:
            config.set_flag(self._member("BuilderFlag", name))
        self.watch(config, on_progress)
        if order.shapes:
            profile = builder.create_optimization_profile()
            for name, (least, usual, largest) in order.shapes.items():
                profile.set_shape(name, least, usual, largest)
            config.add_optimization_profile(profile)
        memory = builder.build_serialized_network(network, config)
        if memory is None:
            raise VerificationError(
                f"TensorRT {self.version} builds no engine: {self.last_words()}", where=order.graph.name
            )
        return bytes(memory)

    def deserialize(self, engine: bytes) -> Any:
        """Deserialize an ``ICudaEngine`` that this device built itself; deserializing runs the code in it.

        Raises:
            VerificationError: TensorRT refuses the bytes.
        """
        self._words.clear()
        found = self.library.Runtime(self.logger).deserialize_cuda_engine(engine)
        if found is None:
            raise VerificationError(f"TensorRT {self.version} refuses the engine: {self.last_words()}")
        return found

    def last_words(self) -> str:
        """Return TensorRT's latest errors and warnings."""
        return "; ".join(self._words[-3:])[:400] or "it gives no reason"

    def _parse_error(self, parser: Any, order: Order) -> Exception:
        if not parser.num_errors:
            return VerificationError(f"TensorRT {self.version} cannot parse it", where=order.graph.name)
        error = parser.get_error(0)
        return UnsupportedOperatorError(
            f"TensorRT {self.version}'s parser refuses it: {' '.join(str(error.desc()).split())[:300]}",
            where=f"{order.graph.name}: node {self.node_of(error)}",
        )

    def _member(self, enumeration: str, name: str) -> Any:
        try:
            return getattr(getattr(self.library, enumeration), name)
        except AttributeError:
            raise VerificationError(
                f"TensorRT {self.version} has no {enumeration}.{name}", remedy="Compile the model again"
            ) from None

    def _logger(self) -> Any:
        trt, words = self.library, self._words
        severity = trt.ILogger.Severity
        told = {severity.INTERNAL_ERROR: logging.ERROR, severity.ERROR: logging.ERROR, severity.WARNING: logging.INFO}

        class Logger(trt.ILogger):  # type: ignore[misc,name-defined]  # the base is known at run time only
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, level: Any, message: str) -> None:
                if level in told:
                    log.log(told[level], "TensorRT: %s", message)
                    words.append(" ".join(message.split()))
                    del words[:-20]

        return Logger()


def monitor(library: Any, on_progress: ProgressCallback) -> Any:
    """Return an ``IProgressMonitor`` that reports the outermost phase (available in 10 and later)."""

    class Monitor(library.IProgressMonitor):  # type: ignore[misc]  # the base is known at run time only
        def __init__(self) -> None:
            library.IProgressMonitor.__init__(self)
            self._outer: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self._outer[phase_name] = num_steps
                on_progress(phase_name, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._outer:
                on_progress(phase_name, step + 1, self._outer[phase_name])
            return True

        def phase_finish(self, phase_name: str) -> None:
            steps = self._outer.pop(phase_name, None)
            if steps is not None:
                on_progress(phase_name, steps, steps)

    return Monitor()
