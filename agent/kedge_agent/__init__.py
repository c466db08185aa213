"""The device agent, and the entry point for applications on a device::

    from kedge_agent import Model

    scores = Model("digits")(image)              # what the fleet installed
    scores = Model("OUT", target="rpi4")(image)  # a release folder, no fleet needed

Importing this package is cheap: numpy and a runtime are loaded when a :class:`Model` is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kedge_protocol.errors import (
    BundleError,
    IncompatibleError,
    InputError,
    KedgeError,
    MissingDependencyError,
    StorageError,
    VerificationError,
)

if TYPE_CHECKING:
    from kedge_agent.model import Model

__all__ = [
    "BundleError",
    "IncompatibleError",
    "InputError",
    "KedgeError",
    "MissingDependencyError",
    "Model",
    "StorageError",
    "VerificationError",
]


def __getattr__(name: str) -> Any:
    if name == "Model":
        from kedge_agent.model import Model

        return Model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
