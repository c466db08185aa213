"""Runs a blob on the Myriad X of an OAK camera, over XLink with depthai 3."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kedge_protocol.errors import InputError, MissingDependencyError, VerificationError
from kedge_targets import contract
from kedge_targets.backends.myriad import environment, wire
from kedge_targets.contract import Array

DISTRIBUTION = "depthai"

_ANSWER_SECONDS = 10.0  # for one inference; networks that fit take milliseconds


@dataclass(frozen=True, kw_only=True)
class Port:
    """An input or output of the model as the session's caller sees it: name in the blob, shape, numpy's dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: str


class Session(contract.Session):
    """One blob running on one camera; one request is in progress at a time."""

    def __init__(
        self, depthai: Any, device: Any, blob: Any, path: Path, outputs: list[Port], inputs: list[str]
    ) -> None:
        self._depthai = depthai
        self._device = device
        self._inputs = [(name, blob.networkInputs[name]) for name in inputs]
        self._outputs = [(port.name, port.shape, port.dtype) for port in outputs]
        self.detail = f"{device.getDeviceName()}, {blob.numShaves} SHAVEs"
        self._pipeline = depthai.Pipeline(device)
        network = self._pipeline.create(depthai.node.NeuralNetwork)
        network.setBlobPath(path)
        # One request at a time has no use for a second thread, which would want as many SHAVEs again.
        network.setNumInferenceThreads(1)
        self._to = network.input.createInputQueue(1, True)
        self._back = network.out.createOutputQueue(1, True)
        self._pipeline.start()

    def run(self, inputs: list[Array]) -> list[Array]:
        """See :meth:`kedge_targets.contract.Session.run`.

        Raises:
            InputError: the number of arrays is wrong, or depthai refuses one.
            VerificationError: the camera does not answer.
        """
        if len(inputs) != len(self._inputs):
            raise InputError(f"{len(inputs)} arrays were given, the blob takes {len(self._inputs)}")
        try:
            message = wire.message(
                self._depthai, [(name, info, array) for (name, info), array in zip(self._inputs, inputs, strict=True)]
            )
        except (RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"depthai cannot send these arrays: {_one_line(error)}") from error
        try:
            self._to.send(message)
            answer = self._back.get(datetime.timedelta(seconds=_ANSWER_SECONDS))
        except (RuntimeError, self._depthai.MessageQueue.QueueException) as error:
            raise VerificationError(
                f"the camera is gone: {_one_line(error)}", remedy="Look at its cable and its power"
            ) from error
        if answer is None:
            # Its answer, if one should still come, would be taken for the next request's.
            self.close()
            raise VerificationError(f"the camera gave no answer within {_ANSWER_SECONDS:g} s")
        return wire.arrays(answer, self._outputs)

    def close(self) -> None:
        """Stop the camera and release it."""
        self._pipeline.stop()
        self._device.close()


def load(entry: Path, shaves: int, inputs: list[str], outputs: list[Port]) -> Session:
    """Run the blob beside ``entry`` on the first free camera with a Myriad X.

    Raises:
        MissingDependencyError: depthai is not installed, or no camera is available.
        VerificationError: the blob is missing or damaged, or belongs to another model.
    """
    for name, value in environment.items():  # an application's own process is no child of Kedge's
        os.environ.setdefault(name, value)
    try:
        import depthai
    except ImportError as error:
        raise MissingDependencyError(f"depthai cannot be loaded: {error}", remedy="pip install depthai") from error
    path = entry.with_name(f"model-{shaves}.blob")
    try:
        blob = depthai.OpenVINO.Blob(path)
    except Exception as error:  # what its bindings raise has no common base
        raise VerificationError(
            f"depthai {depthai.__version__} refuses the file: {_one_line(error)}",
            where=path.name,
            remedy="The file is damaged, or made for another version",
        ) from error
    _check(blob, inputs, [port.name for port in outputs], path)
    device = _opened(depthai)
    try:
        return Session(depthai, device, blob, path, outputs, inputs)
    except Exception as error:  # as above
        device.close()
        raise VerificationError(f"the camera refuses the blob: {_one_line(error)}", where=path.name) from error


def _check(blob: Any, inputs: list[str], outputs: list[str], path: Path) -> None:
    for kind, wanted, there in (("inputs", inputs, blob.networkInputs), ("outputs", outputs, blob.networkOutputs)):
        if sorted(wanted) != sorted(there):
            raise VerificationError(
                f"the blob's {kind} are {sorted(there)}, the model's {sorted(wanted)}",
                where=path.name,
                remedy="Compile the model again",
            )


def _opened(depthai: Any) -> Any:
    found = depthai.Device.getAllAvailableDevices()
    # RVC4 cameras run other files.
    fitting = [info for info in found if info.platform == depthai.XLinkPlatform.X_LINK_MYRIAD_X]
    reasons = []
    for info in fitting:
        try:
            return depthai.Device(info)
        except RuntimeError as error:
            reasons.append(_one_line(error))
    raise MissingDependencyError(
        f"no camera can be had: {'; '.join(reasons)}" if reasons else "no camera with a Myriad X is connected",
        remedy="Connect one, and let the user have it (udev rules); another program may hold it",
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__
