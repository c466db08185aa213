"""Where TensorRT cannot run the model: the same ONNX files in ONNX Runtime, on the GPU if it can, else on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kedge_protocol.errors import InputError, VerificationError
from kedge_targets import contract
from kedge_targets.backends.onnxruntime import runtime as cpu
from kedge_targets.contract import Array
from kedge_targets.graph import library

DISTRIBUTIONS = ("onnxruntime-gpu", *cpu.Runtime.distributions)
"""Of ONNX Runtime: for CUDA, and without it."""

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"


def has_cuda() -> bool:
    """Whether the installed ONNX Runtime was made for CUDA (whether CUDA works here shows when a model is loaded)."""
    return CUDA in library.load(DISTRIBUTIONS[-1]).get_available_providers()


class Session(contract.Session):
    """One model in ONNX Runtime; several threads may run it.

    Args:
        graph: the ONNX file.
        kernel_set: that the file is of, for :attr:`detail`.
        threads: for one call on the CPU; 0 lets the library choose.
        reason: why it is not TensorRT.
        raw: what the file shall be taken to hold; None for what it holds.

    Raises:
        MissingDependencyError: no ONNX Runtime either.
        VerificationError: it refuses the file.
    """

    concurrent = True

    def __init__(self, graph: Path, kernel_set: str, *, threads: int, reason: str, raw: bytes | None = None) -> None:
        onnxruntime = library.load(DISTRIBUTIONS[-1])
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        settings.intra_op_num_threads = threads
        providers = [name for name in (CUDA, CPU) if name in onnxruntime.get_available_providers()]
        try:
            session = onnxruntime.InferenceSession(raw or str(graph), settings, providers=providers)
        except Exception as error:  # the library's errors have no common base but Exception
            raise VerificationError(
                f"ONNX Runtime {onnxruntime.__version__} refuses the file: {library.reason_of(error)}",
                where=graph.name,
                remedy=f"TensorRT was not used: {reason}",
            ) from error
        # Where CUDA's libraries do not load, ONNX Runtime takes the CPU without an error: ask what it took.
        where = "CUDA" if CUDA in session.get_providers() else "the CPU"
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
