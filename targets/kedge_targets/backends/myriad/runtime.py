"""Runs a blob on an OAK camera, the FP16 representation on a Neural Compute Stick 2, or the latter on the CPU without
either."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kedge_protocol.errors import ConfigError, MissingDependencyError
from kedge_targets import contract
from kedge_targets.backends.myriad import camera, processor
from kedge_targets.backends.openvino.runtime import Runtime as Representation

FLOAT = "cpu-f32"
HALF = "cpu-f16"
COARSE = "cpu-f16-sums"

OAK = "oak"
NCS2 = "ncs2"
DEVICES = (OAK, NCS2)
SHAVES = (4, 6, 8)

_BITS = {FLOAT: 24, HALF: 11, COARSE: 8}
_KNOWN_OPTIONS = frozenset({"device", "shaves", "inputs", "outputs"})

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Settings:
    device: str
    shaves: int
    inputs: list[str]
    outputs: list[camera.Port]


class Runtime(contract.Runtime):
    """Runs models with depthai or OpenVINO.

    Options:
        device: ``oak`` or ``ncs2``.
        shaves: 4, 6 or 8; selects the bundle's blob for a camera.
        inputs: the inputs' names in the blob, in the file's order.
        outputs: for each output ``[name in the blob, shape, dtype]``, in the file's order.
    """

    distributions = (*Representation.distributions, camera.DISTRIBUTION)

    @property
    def kernel_sets(self) -> tuple[str, ...]:
        """Return the CPU's kernel sets, with which the host stands in for a Myriad; :meth:`load` by itself uses the
        device, or the first of these if there is none. All have FP16 weights. ``cpu-f32``: sums and results in float32.
        ``cpu-f16``: each layer's result rounded to FP16. ``cpu-f16-sums``: rounded to three bits less, for the
        additional error of FP16 sums within a layer; how large that is on the device was not measured, since none was
        available."""
        return (FLOAT, HALF, COARSE)

    def load(self, entry: Path, options: Mapping[str, Any], *, kernel_set: str | None = None) -> contract.Session:
        """See :meth:`kedge_targets.contract.Runtime.load`. Without a kernel set, the device runs the model; if it is
        not available, the CPU does, and a warning says why."""
        settings = _settings(options)
        names = [port.name for port in settings.outputs]
        if kernel_set is not None:
            if kernel_set not in _BITS:
                raise ConfigError(f"unknown kernel set {kernel_set!r}", remedy=f"Known are {', '.join(_BITS)}")
            return processor.cpu(entry, settings.inputs, names, bits=_BITS[kernel_set])
        devices: dict[str, Callable[[], contract.Session]] = {
            OAK: lambda: camera.load(entry, settings.shaves, settings.inputs, settings.outputs),
            NCS2: lambda: processor.stick(entry, settings.inputs, names),
        }
        try:
            return devices[settings.device]()
        except MissingDependencyError as error:
            absent = error
        try:
            session = processor.cpu(entry, settings.inputs, names, bits=_BITS[FLOAT])
        except MissingDependencyError as error:
            raise absent from error
        log.warning("%s runs on the CPU and not on the %s: %s", entry.name, settings.device, absent)
        session.detail = f"{session.detail} instead of {settings.device}: {absent.what}"
        return session


def _settings(options: Mapping[str, Any]) -> _Settings:
    if unknown := sorted(set(options) - _KNOWN_OPTIONS):
        raise ConfigError(f"unknown runtime option {unknown[0]!r}", remedy=f"Known are {sorted(_KNOWN_OPTIONS)}")
    device, shaves = options.get("device", OAK), options.get("shaves", SHAVES[1])
    check_device(device, shaves)
    try:
        inputs = [str(name) for name in options["inputs"]]
        outputs = [
            camera.Port(name=str(name), shape=tuple(int(size) for size in shape), dtype=str(dtype))
            for name, shape, dtype in options["outputs"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError("inputs and outputs do not name the blob's", remedy="Compile the model again") from error
    return _Settings(device=device, shaves=shaves, inputs=inputs, outputs=outputs)


def check_device(device: object, shaves: object) -> None:
    """Raise :class:`ConfigError` if one of the two is unknown."""
    if device not in DEVICES:
        raise ConfigError(f"device = {device!r} is unknown", remedy=f"Known are {', '.join(DEVICES)}")
    if isinstance(shaves, bool) or shaves not in SHAVES:
        raise ConfigError(f"shaves = {shaves!r} has no blob", remedy=f"Known are {', '.join(map(str, SHAVES))}")
