"""OpenVINO: loading a bundle's intermediate representation and running it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kedge_protocol.errors import ConfigError, InputError, VerificationError
from kedge_targets import contract
from kedge_targets.backends.openvino import library
from kedge_targets.contract import Array

FUSED = "fused"
REFERENCE = "reference"

_KNOWN_OPTIONS = frozenset({"device", "threads", "precision"})
_PRECISIONS = ("f32", "f16", "bf16")


class Runtime(contract.Runtime):
    """OpenVINO's plugins; ``CPU`` unless the options name another device.

    Options:
        device: OpenVINO's name, ``CPU``.
        threads: for one call; 0 lets the library choose.
        precision: of what is not quantized; ``f32`` unless told. OpenVINO's own choice is bf16 wherever the processor
            has it, so the same file would answer differently from one device to the next.
    """

    distributions = ("openvino",)

    @property
    def kernel_sets(self) -> tuple[str, ...]:
        """``fused``: the library's own choice, integer kernels. ``reference``: low-precision transformations off,
        so that quantization is computed in float, as its graph says.

        Measured on ic_resnet8 and kws_dscnn (int8): 2025.0, 2025.3 and 2026.4 answer bit for bit the same, and so
        does an emulated Haswell where the weights have 7 bits; threads, pinning, streams, snippets and execution mode
        change nothing. What is left to vary is how much is fused.
        """
        return (FUSED, REFERENCE)

    def load(self, entry: Path, options: Mapping[str, Any], *, kernel_set: str | None = None) -> Session:
        """See :meth:`kedge_targets.contract.Runtime.load`."""
        device, settings = _settings(options, kernel_set or FUSED)
        openvino = library.load()
        try:
            compiled = openvino.Core().compile_model(str(entry), device, settings)
        except Exception as error:  # the library raises RuntimeError and its own, without a common base
            raise VerificationError(
                f"OpenVINO {openvino.__version__.split('-')[0]} refuses the file: {reason_of(error)}",
                where=entry.name,
                remedy="The file is damaged, or made for another version",
            ) from error
        return Session(compiled)


class Session(contract.Session):
    """One loaded model with one inference request: for one thread at a time."""

    def __init__(self, compiled: Any) -> None:
        self._infer = compiled.create_infer_request().infer
        self._compiled = compiled

    def run(self, inputs: list[Array]) -> list[Array]:
        """See :meth:`kedge_targets.contract.Session.run`.

        Raises:
            InputError: OpenVINO refuses these arrays.
        """
        try:
            # The inputs are used in place; the outputs are copied, for the next call writes over them. By number, not
            # as a list: of a list the library asks first what its items are, which takes it 27 us.
            answer = self._infer(dict(enumerate(inputs)), share_inputs=True)
        except Exception as error:  # the library raises RuntimeError and its own, without a common base
            raise InputError(f"OpenVINO cannot run these arrays: {reason_of(error)}") from error
        return list(answer.values())

    def close(self) -> None:
        """Free the request and the model."""
        self._infer = _closed
        self._compiled = None


def reason_of(error: Exception) -> str:
    """OpenVINO's own words, without the places in its sources."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith(("Exception from", "Check '"))]
    return " ".join(told)[:400] or " ".join(str(error).split())[:400] or type(error).__name__


def _settings(options: Mapping[str, Any], kernel_set: str) -> tuple[str, dict[str, Any]]:
    if unknown := sorted(set(options) - _KNOWN_OPTIONS):
        raise ConfigError(f"unknown runtime option {unknown[0]!r}", remedy=f"Known are {sorted(_KNOWN_OPTIONS)}")
    precision = options.get("precision", "f32")
    if precision not in _PRECISIONS:
        raise ConfigError(f"precision = {precision!r} is unknown", remedy=f"Known are {', '.join(_PRECISIONS)}")
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    threads = options.get("threads", 0)
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 0:
        raise ConfigError(f"threads = {threads!r} is no number of threads", remedy="Give 0 or more")
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    if kernel_set == REFERENCE:
        settings["LP_TRANSFORMS_MODE"] = "NO"
    elif kernel_set != FUSED:
        raise ConfigError(f"unknown kernel set {kernel_set!r}", remedy=f"Known are {FUSED} and {REFERENCE}")
    return str(options.get("device", "CPU")), settings


def _closed(*_: object, **__: object) -> Any:
    raise InputError("the model is closed")
