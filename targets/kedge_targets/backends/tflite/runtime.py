"""Loads a bundle's ``.tflite`` in LiteRT or its predecessor on a CPU, and runs it."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import queue
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kedge_protocol.errors import ConfigError, InputError, MissingDependencyError, VerificationError
from kedge_protocol.packages import AGENT, pip_install
from kedge_targets import contract, refusal_remedies
from kedge_targets.calls import plan
from kedge_targets.contract import Array

XNNPACK = "xnnpack"
BUILTIN = "builtin"

_MODULES = ("ai_edge_litert.interpreter", "tflite_runtime.interpreter")
_KNOWN_OPTIONS = frozenset({"threads", "instances"})


class Runtime(contract.Runtime):
    """Runs models in LiteRT's interpreter (``ai-edge-litert``, else ``tflite-runtime``, which has the same interface).

    Options:
        threads: number of threads for one call; 0 lets the library choose.
        instances: number of interpreters, each for one call at a time; 1 by default. Those after the first are made
            when they are needed.
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

    def ways(self, options: Mapping[str, Any], cores: int) -> tuple[contract.Way, ...]:
        """See :meth:`kedge_targets.contract.Runtime.ways`: numbers of threads, with interpreters that share the
        cores."""
        return tuple(
            contract.Way(options={"threads": threads, "instances": cores // threads}, calls=cores // threads)
            for threads in plan.numbers_of_threads(cores)
        )

    def load(self, entry: Path, options: Mapping[str, Any], *, kernel_set: str | None = None) -> Session | Instances:
        """See :meth:`kedge_targets.contract.Runtime.load`."""
        library = _library()
        settings = _settings(library, options, kernel_set or XNNPACK)
        instances = _count(options, "instances", 1)
        if instances == 1:
            return Session(_opened(library, str(entry), settings, entry.name))
        # The name may be gone when the second one is made.
        file = os.open(entry, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return Instances(lambda: _opened(library, f"/proc/self/fd/{file}", settings, entry.name), instances, file)
        except BaseException:
            os.close(file)
            raise


def _opened(library: Any, path: str, settings: Mapping[str, Any], name: str) -> Any:
    try:
        interpreter = library.Interpreter(model_path=path, **settings)
        interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        reason = _one_line(error)
        raise VerificationError(
            f"{library.__name__.partition('.')[0]} refuses the file: {reason}",
            where=name,
            remedy=refusal_remedies.remedy(reason),
        ) from error
    return interpreter


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


class Instances(contract.Session):
    """One loaded model with several interpreters, for as many threads at once; further threads wait.

    Args:
        opened: makes an interpreter.
        most: how many there may be.
        file: descriptor of the model's file, from which they are made.
    """

    concurrent = True

    def __init__(self, opened: Callable[[], Any], most: int, file: int) -> None:
        self._opened = opened
        self._file = file
        # The one that was used last comes first: its tensors may still be in the processor's cache.
        self._free: queue.LifoQueue[Session | None] = queue.LifoQueue()
        for _ in range(most - 1):
            self._free.put(None)
        self._free.put(Session(opened()))

    def run(self, inputs: list[Array]) -> list[Array]:
        """See :meth:`Session.run`."""
        session = self._free.get()
        try:
            if session is None:
                session = Session(self._opened())
            return session.run(inputs)
        finally:
            self._free.put(session)

    def close(self) -> None:
        """Free the interpreters; no call may be running."""
        os.close(self._file)
        with contextlib.suppress(queue.Empty):
            while True:
                session = self._free.get_nowait()
                if session is not None:
                    session.close()


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
    threads = _count(options, "threads", 0)
    if kernel_set not in (XNNPACK, BUILTIN):
        raise ConfigError(f"unknown kernel set {kernel_set!r}", remedy=f"Known are {XNNPACK} and {BUILTIN}")
    kind = library.OpResolverType
    resolver = kind.AUTO if kernel_set == XNNPACK else kind.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    # More threads than cores wait for each other: 75 ms for what one thread does in 0.3 (ic_resnet8, built-in, 4 on 2).
    usable = min(threads, len(os.sched_getaffinity(0)))
    return {"num_threads": usable or None, "experimental_op_resolver_type": resolver}


def _count(options: Mapping[str, Any], name: str, default: int) -> int:
    value = options.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < default:
        raise ConfigError(f"{name} = {value!r} is no number of {name}", remedy=f"Give {default} or more")
    return value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]
