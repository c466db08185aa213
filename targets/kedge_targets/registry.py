"""Finds backends and their compilers and runtimes; no other module knows their names. See :mod:`.backend_packages`."""

from __future__ import annotations

import logging
from typing import Any

from kedge_protocol.errors import TargetError
from kedge_targets import backend_packages
from kedge_targets.backend_packages import BACKENDS, names
from kedge_targets.contract import Compiler, Runtime
from kedge_targets.importer import Importer

__all__ = ["BACKENDS", "compiler", "importers", "names", "runtime"]

log = logging.getLogger(__name__)


def compiler(name: str) -> Compiler:
    """The host's half of a backend.

    Raises:
        TargetError: unknown backend, or a third party's that cannot be loaded.
    """
    made: Compiler = _made(name, "compiler", Compiler)
    return made


def runtime(name: str) -> Runtime:
    """The device's half of a backend; see :func:`compiler`."""
    made: Runtime = _made(name, "runtime", Runtime)
    return made


def importers() -> list[Importer]:
    """Those backends' importers that have one, by the backends' names. A third party's that cannot be loaded is left
    out with a warning: other models can still be read."""
    found = []
    for name in names():
        try:
            if backend_packages.has(name, "importer"):
                found.append(_made(name, "importer", Importer))
        except TargetError as error:
            log.warning("%s", error)
    return found


def _made(name: str, part: str, kind: type[Any]) -> Any:
    """An instance of the class that a backend's module holds under the contract's name."""
    module = backend_packages.load(name, part)
    if name in backend_packages.own():
        return getattr(module, kind.__name__)()
    try:
        made = getattr(module, kind.__name__)()
    except Exception as error:  # whatever the third party's class raises
        raise backend_packages.broken(name, f"cannot be made: {type(error).__name__}: {error}") from error
    if not isinstance(made, kind):
        raise backend_packages.broken(name, f"has a {kind.__name__} that is no {kind.__module__}.{kind.__name__}")
    return made
