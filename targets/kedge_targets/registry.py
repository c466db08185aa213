"""Finding backends: each is a folder below ``backends``; nobody else knows their names."""

from __future__ import annotations

import importlib
from pathlib import Path

from kedge_protocol.errors import TargetError
from kedge_protocol.spelling import known_names
from kedge_targets.contract import Compiler, Runtime
from kedge_targets.importer import Importer

BACKENDS = Path(__file__).parent / "backends"


def names() -> list[str]:
    """Every backend there is, sorted."""
    return sorted(path.parent.name for path in BACKENDS.glob("*/runtime.py"))


def _checked(name: str) -> str:
    if name not in names():
        raise TargetError(f"unknown backend {name!r}", remedy=known_names(name, names()))
    return name


def compiler(name: str) -> Compiler:
    """The host's half of a backend.

    Raises:
        TargetError: unknown backend.
    """
    module = importlib.import_module(f"kedge_targets.backends.{_checked(name)}.compiler")
    made: Compiler = module.Compiler()
    return made


def runtime(name: str) -> Runtime:
    """The device's half of a backend; see :func:`compiler`."""
    module = importlib.import_module(f"kedge_targets.backends.{_checked(name)}.runtime")
    made: Runtime = module.Runtime()
    return made


def importers() -> list[Importer]:
    """Those backends' importers that have one, by the backends' names."""
    modules = [
        importlib.import_module(f"kedge_targets.backends.{name}.importer")
        for name in names()
        if (BACKENDS / name / "importer.py").is_file()
    ]
    return [module.Importer() for module in modules]
