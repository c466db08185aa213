"""The exception tree of Kedge.

::

    KedgeError
    ├── InputError                the user's input is wrong
    │   ├── ModelError            not a model, too new, damaged
    │   │   └── UnsupportedOperatorError
    │   ├── DatasetError          arrays of the wrong name, shape, dtype, length, content
    │   ├── TargetError           unknown target, broken target file
    │   └── ConfigError           broken configuration file or option
    ├── MissingDependencyError    an extra, a program, a toolchain or a newer Python is missing
    │   └── ToolchainError
    ├── WorkerError               the child process failed to answer
    │   ├── WorkerTimeoutError
    │   ├── WorkerMemoryError
    │   ├── WorkerCrashedError    killed by a signal, or exited without an answer
    │   └── WorkerTaskError       the task itself raised
    ├── CompileError              the compiler could not fulfil the request
    │   ├── LoweringError         one backend could not lower this graph with this plan
    │   │   └── CapacityError     the device lacks the room or the requested speed
    │   ├── StepError             a compression step failed on this model
    │   │   └── DivergedError     training produced NaN or infinity, or only made it worse
    │   └── BudgetError           no candidate meets the budget; says how near the best one came
    ├── BundleError               a layout, manifest or configuration violates the format
    │   └── DigestMismatchError
    ├── IncompatibleError         a valid bundle that this device cannot run
    ├── VerificationError         golden vectors do not match
    ├── MessageError              a message on the wire violates the protocol
    ├── StorageError              disk full, not writable, not readable
    └── FleetError                unknown device, release, rollout; conflict
        └── BrokerError

Every message says what was wrong, where, and what to do.
"""

from __future__ import annotations

from typing import Any


class KedgeError(Exception):
    """The base of every error that Kedge raises on purpose.

    Args:
        what: what was wrong, as one sentence without a full stop.
        where: the file, node, field or device in question.
        remedy: what the reader can do about it.
    """

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.what = what
        self.where = where
        self.remedy = remedy
        super().__init__(what, where, remedy)

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own calls the class with ``args``, which are not the constructor's.
        return _unpickled, (type(self), self.what, self.where, self.remedy), self.__dict__

    def __str__(self) -> str:
        text = self.what if self.where is None else f"{self.where}: {self.what}"
        return text if self.remedy is None else f"{text}. {self.remedy}"


def _unpickled(kind: type[KedgeError], what: str, where: str | None, remedy: str | None) -> KedgeError:
    error = kind.__new__(kind)
    KedgeError.__init__(error, what, where=where, remedy=remedy)
    return error


class InputError(KedgeError):
    """The user's input is wrong."""


class ModelError(InputError):
    """A model file that cannot be read or is not valid."""


class UnsupportedOperatorError(ModelError):
    """An operator that no backend of the target supports; names the operator and its node."""


class DatasetError(InputError):
    """Calibration or evaluation data that does not fit the model."""


class TargetError(InputError):
    """An unknown target or a broken target file."""


class ConfigError(InputError):
    """A broken configuration file or option."""


class MissingDependencyError(KedgeError):
    """An extra, a program or a newer Python is missing; the remedy says how to get it."""


class ToolchainError(MissingDependencyError):
    """An isolated toolchain is missing or could not be installed."""


class WorkerError(KedgeError):
    """The worker's child process failed to answer; the log's path is in the message."""


class WorkerTimeoutError(WorkerError):
    """The child overran its deadline and was killed."""


class WorkerMemoryError(WorkerError):
    """The child overran its memory limit and was killed."""


class WorkerCrashedError(WorkerError):
    """The child died by a signal or exited without an answer."""


class WorkerTaskError(WorkerError):
    """The task ran and raised an error that is not Kedge's own."""


class CompileError(KedgeError):
    """The compiler could not fulfil the request."""


class LoweringError(CompileError):
    """One backend could not lower this graph with this plan."""


class CapacityError(LoweringError):
    """The device lacks the room or the requested speed; fewer bits may help."""


class StepError(CompileError):
    """A compression step failed on this model."""


class DivergedError(StepError):
    """Training produced NaN or infinity, or only made the model worse."""


class BudgetError(CompileError):
    """No candidate meets the budget; the message says how near the best one came and where it is stored."""


class BundleError(KedgeError):
    """A layout, manifest or configuration that violates the format."""


class DigestMismatchError(BundleError):
    """Bytes that do not match their digest."""


class IncompatibleError(KedgeError):
    """A valid bundle that this device cannot run (target, runtime version, memory)."""


class VerificationError(KedgeError):
    """Golden vectors do not match on this runtime."""


class EndpointError(KedgeError):
    """The served endpoint does not answer, or another bundle does."""


class NeighbourError(KedgeError):
    """Another device that holds a part of a model does not answer, refuses, or was lost during an answer."""


class MessageError(KedgeError):
    """A message on the wire that violates the protocol."""


class StorageError(KedgeError):
    """The disk is full, not writable or not readable."""


class FleetError(KedgeError):
    """Unknown device, release or rollout, or a conflict between them."""


class BrokerError(FleetError):
    """The broker is unreachable or refuses the connection."""
