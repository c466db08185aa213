"""Locates backends: Kedge's own are folders below ``backends``; third parties' are found by an entry point.

A third party's distribution names its package in the group ``kedge.backends``::

    [project.entry-points."kedge.backends"]
    mine = "my_backend"

The package holds what a folder below ``backends`` holds: ``compiler.py``, ``runtime.py``, and where it needs them
``importer.py`` and, in the package itself, ``environment``. Kedge's own names come first.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

from kedge_protocol.errors import TargetError
from kedge_protocol.spelling import known_names

BACKENDS = Path(__file__).parent / "backends"
GROUP = "kedge.backends"


def own() -> list[str]:
    """Return Kedge's own backends, sorted."""
    return sorted(path.parent.name for path in BACKENDS.glob("*/runtime.py"))


@functools.cache
def foreign() -> dict[str, str]:
    """Return third-party backends, name → package, from the entry points of the installed distributions."""
    from importlib import metadata

    points = metadata.entry_points(group=GROUP)
    return {point.name: point.value for point in points if point.name not in own()}


def names() -> list[str]:
    """Return all backends, sorted."""
    return sorted([*own(), *foreign()])


def load(name: str, part: str | None = None) -> ModuleType:
    """Import a backend's package, or a module of it.

    Args:
        part: the module: ``compiler``, ``runtime``, ``importer``.

    Raises:
        TargetError: unknown backend, or a third party's that cannot be loaded; then it names the entry point.
    """
    if name in own():
        package = f"kedge_targets.backends.{name}"
        return importlib.import_module(f"{package}.{part}" if part else package)
    if name not in foreign():
        raise TargetError(f"unknown backend {name!r}", remedy=known_names(name, names()))
    package = foreign()[name]
    try:
        return importlib.import_module(f"{package}.{part}" if part else package)
    except Exception as error:  # whatever the third party's module raises
        raise broken(name, f"cannot be loaded: {type(error).__name__}: {error}") from error


def has(name: str, part: str) -> bool:
    """Return whether a backend has a module with that name.

    Raises:
        TargetError: see :func:`load`.
    """
    return importlib.util.find_spec(f"{load(name).__name__}.{part}") is not None


def broken(name: str, what: str) -> TargetError:
    """Return the error for a broken third-party backend."""
    return TargetError(
        f"backend {name!r} {what}",
        where=f"entry point {GROUP}: {name} = {foreign()[name]}",
        remedy="Mend or remove the distribution that declares it",
    )
