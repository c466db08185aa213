"""On a child's PYTHONPATH: a runtime that hangs, crashes, leaks or waits for a second call when the first number of its
input says so."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

HANG, CRASH, LEAK, MEET = 1111.0, 2222.0, 3333.0, 4444.0
_two = threading.Barrier(2, timeout=20)
_kept: list[bytearray] = []


def _patch(module: ModuleType) -> None:
    original = module.Loaded.__call__

    def answer(self: Any, given: Any, named: Any) -> Any:
        first = float(given.flat[0]) if hasattr(given, "flat") else 0.0
        if first == HANG:
            while True:
                time.sleep(1)
        if first == CRASH:
            ctypes.string_at(0)
        if first == MEET:
            _two.wait()
        if first == LEAK:
            _kept.append(bytearray(b"x") * (64 << 20))
        return original(self, given, named)

    module.Loaded.__call__ = answer


class _Finder(MetaPathFinder):
    """Patches the module when it is imported; nothing is imported for it before."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "kedge_agent.loaded":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _patch(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if __name__ == "sitecustomize":  # a test that reads the constants is not a child
    sys.meta_path.insert(0, _Finder())
