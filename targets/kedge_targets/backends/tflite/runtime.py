"""Loads a bundle's ``.tflite`` in LiteRT or its predecessor on a CPU, and runs it."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kedge_protocol.errors import ConfigError, InputError, MissingDependencyError, VerificationError
from kedge_protocol.packages import AGENT, pip_install
from kedge_targets import contract
from kedge_targets.contract import Array

XNNPACK = "xnnpack"
BUILTIN = "builtin"

_MODULES = ("ai_edge_litert.interpreter", "tflite_runtime.interpreter")
_KNOWN_OPTIONS = frozenset({"threads"})


class Runtime(contract.Runtime):
    """Runs models in LiteRT's interpreter (``ai-edge-litert``, else ``tflite-runtime``, which has the same interface).

    Options:
        threads: number of threads for one call; 0 lets the library choose.
    """

    distributions = ("ai-edge-litert", "tflite-runtime")

    @property
    def kernel_sets(self) -> tuple[str, ...]:
        """Return the kernel sets. ``xnnpack``: LiteRT's default. ``builtin``: the kernels without a delegate, which
        tflite-runtime 2.14 uses for int8. The two round differently: measured on ic_resnet8 int8 up to 66 steps of the
        output."""
        return (XNNPACK, BUILTIN)

    def check(self) -> None:
        """Raise :class:`MissingDependencyError` if no runtime is installed."""
        _library()

    def load(self, entry: Path, options: Mapping[str, Any], *, kernel_set: str | None = None) -> Session:
        """See :meth:`kedge_targets.contract.Runtime.load`."""
        library = _library()
        settings = _settings(library, options, kernel_set or XNNPACK)
        try:
            interpreter = library.Interpreter(model_path=str(entry), **settings)
            interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise VerificationError(
                f"{library.__name__.partition('.')[0]} refuses the file: {_one_line(error)}",
                where=entry.name,
                remedy="The file is damaged, or made for another version",
            ) from error
        return Session(interpreter)


class Session(contract.Session):
    """One loaded model; an interpreter holds the tensors of one call, so only one thread may run it at a time."""

    def __init__(self, interpreter: Any) -> None:
        self._interpreter = interpreter
        # Bound once: each of these lists is made anew by the library.
        self._inputs = [detail["index"] for detail in interpreter.get_input_details()]
        self._outputs = [detail["index"] for detail in interpreter.get_output_details()]
        self._set = interpreter.set_tensor
        self._get = interpreter.get_tensor
        self._invoke = interpreter.invoke

    def run(self, inputs: list[Array]) -> list[Array]:
        """See :meth:`kedge_targets.contract.Session.run`.

        Raises:
            InputError: the interpreter refuses these arrays.
        """
        try:
            for index, array in zip(self._inputs, inputs, strict=True):
                self._set(index, array)
            self._invoke()
            return [self._get(index) for index in self._outputs]
        except (ValueError, RuntimeError) as error:
            raise InputError(f"LiteRT cannot run these arrays: {_one_line(error)}") from error

    def close(self) -> None:
        """Free the interpreter."""
        del self._interpreter, self._set, self._get, self._invoke


@functools.cache
def _library() -> Any:
    reasons = []
    for name in _MODULES:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            reasons.append(str(error))
    raise MissingDependencyError(
        f"LiteRT cannot be loaded: {'; '.join(reasons)}",
        remedy=f"Install it with {pip_install('tflite', of=AGENT)}, on old boards with "
        f"{pip_install('tflite-legacy', of=AGENT)}",
    )


def _settings(library: Any, options: Mapping[str, Any], kernel_set: str) -> dict[str, Any]:
    if unknown := sorted(set(options) - _KNOWN_OPTIONS):
        raise ConfigError(f"unknown runtime option {unknown[0]!r}", remedy=f"Known are {sorted(_KNOWN_OPTIONS)}")
    threads = options.get("threads", 0)
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 0:
        raise ConfigError(f"threads = {threads!r} is no number of threads", remedy="Give 0 or more")
    if kernel_set not in (XNNPACK, BUILTIN):
        raise ConfigError(f"unknown kernel set {kernel_set!r}", remedy=f"Known are {XNNPACK} and {BUILTIN}")
    kind = library.OpResolverType
    resolver = kind.AUTO if kernel_set == XNNPACK else kind.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    # More threads than cores wait for each other: 75 ms for what one thread does in 0.3 (ic_resnet8, built-in, 4 on 2).
    usable = min(threads, len(os.sched_getaffinity(0)))
    return {"num_threads": usable or None, "experimental_op_resolver_type": resolver}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]
