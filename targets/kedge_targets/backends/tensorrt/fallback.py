"""Runs the same ONNX files in ONNX Runtime if TensorRT cannot run the model, on the GPU if possible, else on the
CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kedge_protocol.errors import InputError
from kedge_targets import contract
from kedge_targets.backends.onnxruntime import runtime as cpu
from kedge_targets.contract import Array
from kedge_targets.graph import library

DISTRIBUTIONS = ("onnxruntime-gpu", *cpu.Runtime.distributions)
"""Distributions of ONNX Runtime: with CUDA, and without it."""

CUDA = "CUDAExecutionProvider"


def has_cuda() -> bool:
    """Return whether the installed ONNX Runtime was built for CUDA (only loading a model shows whether CUDA works
    here)."""
    return CUDA in library.load(DISTRIBUTIONS[-1]).get_available_providers()


def opened(
    onnxruntime: Any, graph: str | bytes, settings: Any, *, where: str, remedy: str | None = None
) -> tuple[Any, bool]:
    """Open a session on the GPU if possible, else on the CPU; return it, and whether it is on the GPU.

    Raises:
        VerificationError: see :func:`kedge_targets.backends.onnxruntime.runtime.opened`.
    """
    providers = [name for name in (CUDA, cpu.CPU) if name in onnxruntime.get_available_providers()]
    session = cpu.opened(onnxruntime, graph, settings, where=where, providers=providers, remedy=remedy)
    # Where CUDA's libraries do not load, ONNX Runtime takes the CPU without an error: ask what it took.
    return session, CUDA in session.get_providers()


class Session(contract.Session):
    """One model in ONNX Runtime; several threads may run it at once.

    Args:
        graph: the ONNX file.
        kernel_set: kernel set of the file, for :attr:`detail`.
        threads: number of threads for one call on the CPU; 0 lets the library choose.
        reason: why TensorRT is not used.
        raw: content to use instead of the file's; None for the file's own.

    Raises:
        MissingDependencyError: ONNX Runtime is not installed either.
        VerificationError: ONNX Runtime refuses the file.
    """

    concurrent = True

    def __init__(self, graph: Path, kernel_set: str, *, threads: int, reason: str, raw: bytes | None = None) -> None:
        onnxruntime = library.load(DISTRIBUTIONS[-1])
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        settings.intra_op_num_threads = threads
        remedy = f"TensorRT was not used: {reason}"
        session, on_gpu = opened(onnxruntime, raw or str(graph), settings, where=graph.name, remedy=remedy)
        where = "CUDA" if on_gpu else "the CPU"
        self.detail = f"fell back to ONNX Runtime {onnxruntime.__version__} on {where}, {kernel_set}: {reason}"
        self._session: Any = session
        self._inputs = [tensor.name for tensor in session.get_inputs()]
        self._outputs = [tensor.name for tensor in session.get_outputs()]

    def run(self, inputs: list[Array]) -> list[Array]:
        """See :meth:`kedge_targets.contract.Session.run`.

        Raises:
            InputError: ONNX Runtime refuses these arrays; or the session is closed.
        """
        session = self._session
        if session is None:
            raise InputError("the model is closed")
        try:
            answer: list[Array] = session.run(self._outputs, dict(zip(self._inputs, inputs, strict=True)))
        except Exception as error:  # the library's errors have no common base but Exception
            raise InputError(f"ONNX Runtime cannot run these arrays: {library.reason_of(error)}") from error
        return answer

    def close(self) -> None:
        """Free the session."""
        self._session = None
