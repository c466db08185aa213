"""Runs the FP16 representation in OpenVINO, on a Neural Compute Stick 2 or on a CPU.

On a CPU, weights are FP16 and sums are float32. The additional error of a Myriad's FP16 arithmetic is emulated by
rounding each layer's result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kedge_protocol.errors import InputError, MissingDependencyError, VerificationError
from kedge_targets import contract, refusal_remedies
from kedge_targets.backends.openvino import emulation, library
from kedge_targets.backends.openvino.library import reason_of
from kedge_targets.contract import Array

STICK = "MYRIAD"
CPU = "CPU"

_CPU_SETTINGS = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}


class Session(contract.Session):
    """One compiled model with one inference request."""

    def __init__(self, compiled: Any, inputs: list[int], outputs: list[int], detail: str) -> None:
        self.detail = detail
        self._compiled = compiled
        self._request = compiled.create_infer_request()
        self._inputs = inputs
        self._outputs = outputs

    def run(self, inputs: list[Array]) -> list[Array]:
        """See :meth:`kedge_targets.contract.Session.run`.

        Raises:
            InputError: OpenVINO refuses these arrays.
        """
        try:
            self._request.infer(dict(zip(self._inputs, inputs, strict=True)))
            return [np.array(self._request.get_output_tensor(index).data) for index in self._outputs]
        except Exception as error:  # the library raises RuntimeError and its own, without a common base
            raise InputError(f"OpenVINO cannot run these arrays: {reason_of(error)}") from error

    def close(self) -> None:
        """Free the request and the model."""
        self._request = self._compiled = None


def made_by(port: Any) -> str:
    """Return the name of a model's output as the Myriad compiler gives it: that of the layer that produces it."""
    source = port.get_node().input_value(0)
    name = str(source.get_node().get_friendly_name())
    return name if source.get_node().get_output_size() == 1 else f"{name}.{source.get_index()}"


def stick(entry: Path, inputs: list[str], outputs: list[str]) -> Session:
    """Load the file on a Neural Compute Stick 2.

    Raises:
        MissingDependencyError: there is no OpenVINO, or one without the Myriad plugin, or no stick.
        VerificationError: the stick refuses the file.
    """
    openvino, core = _core()
    if not any(name.split(".")[0] == STICK for name in core.available_devices):
        raise MissingDependencyError(
            f"OpenVINO {_version(openvino)} sees no Neural Compute Stick 2, only {', '.join(core.available_devices)}",
            remedy="Take Intel's archive of OpenVINO 2022.3 (its wheel has no Myriad plugin), connect the stick, and "
            "let the user have it (udev rules)",
        )
    return _Opening(openvino, core, entry, inputs, outputs).on(STICK, {})


def cpu(entry: Path, inputs: list[str], outputs: list[str], *, bits: int = emulation.FLOAT32_BITS) -> Session:
    """Load the file on this machine's CPU.

    Args:
        bits: number of significand bits that each layer's result keeps; FP16 has 11.

    Raises:
        MissingDependencyError: there is no OpenVINO.
        VerificationError: OpenVINO refuses the file.
    """
    openvino, core = _core()
    supported = {str(name) for name in core.get_property(CPU, "SUPPORTED_PROPERTIES")}
    settings = {name: value for name, value in _CPU_SETTINGS.items() if name in supported}
    return _Opening(openvino, core, entry, inputs, outputs).on(CPU, settings, bits=bits)


@dataclass(frozen=True)
class _Opening:
    """A file about to be compiled for a device."""

    openvino: Any
    core: Any
    entry: Path
    inputs: list[str]
    outputs: list[str]

    def on(self, device: str, settings: Mapping[str, str], *, bits: int = emulation.FLOAT32_BITS) -> Session:
        version = _version(self.openvino)
        try:
            model = self.core.read_model(str(self.entry))
            # Releases disagree on the order of what a file holds: it is found by name.
            names_in = [port.get_node().get_friendly_name() for port in model.inputs]
            names_out = [made_by(port) for port in model.outputs]
            places_in = [names_in.index(name) for name in self.inputs]
            places_out = [names_out.index(name) for name in self.outputs]
            if bits < emulation.FLOAT32_BITS:
                emulation.round_layers(model, bits)
            compiled = self.core.compile_model(model, device, dict(settings))
            return Session(compiled, places_in, places_out, f"OpenVINO {version} on {device}")
        except Exception as error:  # the library raises RuntimeError and its own, without a common base
            raise VerificationError(
                f"OpenVINO {version} refuses the file: {reason_of(error)}",
                where=self.entry.name,
                remedy=refusal_remedies.remedy(reason_of(error)),
            ) from error


def _core() -> tuple[Any, Any]:
    """Return the package and a ``Core``, which is at the top of the package from 2023.1 on, in ``runtime`` before."""
    package = library.load()
    if hasattr(package, "Core"):
        return package, package.Core()
    try:
        from openvino import runtime
    except ImportError as error:
        raise MissingDependencyError(f"OpenVINO cannot be loaded: {error}") from error
    return runtime, runtime.Core()


def _version(openvino: Any) -> str:
    told = getattr(openvino, "__version__", "") or openvino.get_version()
    return str(told).split("-")[0]
