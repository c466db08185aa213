"""Calls the user's factory: a function without arguments that makes a PyTorch module."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kedge.importing.model_kinds import Factory
from kedge.importing.pytorch import Example, argument_names
from kedge_protocol.errors import ModelError

FORM = (
    "A factory returns a torch.nn.Module, or (module, example_inputs), or (module, example_inputs, free_axes) with "
    'free_axes such as {"ids": {1: "sequence"}}'
)


def call_factory(factory: Factory, folder: Path) -> tuple[Any, Example | None]:
    """Call the factory and return its module or exported program, with its example inputs if it gives any.

    Args:
        folder: the user's current folder, in which modules and the files that the factory opens are found.

    Raises:
        ModelError: the factory does not exist, raises, or returns something else.
    """
    where = f"{factory.where}:{factory.name}"
    with _inside(folder):
        try:
            made = getattr(_module(factory, folder), factory.name)()
        except ModelError:
            raise
        except AttributeError as error:
            if getattr(error, "name", None) != factory.name:
                raise _raised(error, where) from error
            raise ModelError(
                f"has no function {factory.name!r}", where=factory.where, remedy="Give FILE.py:FACTORY"
            ) from error
        except BaseException as error:
            raise _raised(error, where) from error
    return parse_factory_result(made, where)


def _raised(error: BaseException, where: str) -> ModelError:
    traceback.print_exc()
    frames = traceback.extract_tb(error.__traceback__)
    line = f" (line {frames[-1].lineno} of {Path(frames[-1].filename).name})" if frames else ""
    return ModelError(
        f"the factory raises {type(error).__name__}: {error}{line}", where=where, remedy="Correct the factory"
    )


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before, path = Path.cwd(), list(sys.path)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = path
        os.chdir(before)


def _module(factory: Factory, folder: Path) -> Any:
    if factory.file is None:
        try:
            return importlib.import_module(factory.where)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{factory.where}.".startswith(f"{error.name}."):
                raise
            raise ModelError(
                f"there is no module {error.name!r}",
                where=factory.where,
                remedy=f"It is looked for in {folder} and among the installed packages; or give FILE.py:FACTORY",
            ) from error
    sys.path.insert(0, str(factory.file.parent))
    # A name that no package has: the user's model.py must not be taken for another model.
    name = f"kedge_factory_{factory.file.stem}"
    spec = importlib.util.spec_from_file_location(name, factory.file)
    if spec is None or spec.loader is None:
        raise ModelError("cannot be imported", where=str(factory.file), remedy="Give FILE.py:FACTORY")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def parse_factory_result(made: Any, where: str) -> tuple[Any, Example | None]:
    """Interpret a factory's return value.

    Raises:
        ModelError: the value does not have the form :data:`FORM`.
    """
    if isinstance(made, torch.export.ExportedProgram):
        return made, None
    module, *rest = made if isinstance(made, tuple) and made else (made,)
    if not isinstance(module, torch.nn.Module) or len(rest) > 2:
        raise ModelError(f"returns {type(module).__name__}, no PyTorch module", where=where, remedy=FORM)
    if not rest or rest[0] is None:
        return module, None
    args, kwargs = _arguments(rest[0])
    return module, Example(args, kwargs, _free(module, len(args), rest[1] if len(rest) == 2 else {}, where))


def _arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    return (example,), {}


def _free(module: torch.nn.Module, count: int, given: Any, where: str) -> dict[str, dict[int, str]]:
    """Return the free axes by argument name; an axis may be named by a string or a ``torch.export.Dim``."""
    named = given
    if isinstance(given, Sequence) and not isinstance(given, str):
        named = dict(zip(argument_names(module, count), given, strict=False))
    try:
        return {
            str(name): {int(axis): str(getattr(dim, "__name__", dim)) for axis, dim in (shape or {}).items()}
            for name, shape in named.items()
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise ModelError(f"its free axes are not understood: {given!r}", where=where, remedy=FORM) from error


def example_from_samples(module: torch.nn.Module, inputs: Mapping[str, Any], where: str) -> Example:
    """Return example inputs from samples, in the order of forward's arguments.

    Args:
        inputs: name → array, batch axis first; a single one may have any name.

    Raises:
        ModelError: the module is TorchScript, there are no samples, or an argument has no array.
    """
    import inspect

    import numpy as np

    if isinstance(module, torch.jit.ScriptModule):
        raise ModelError(
            "is TorchScript, which torch.export does not trace",
            where=where,
            remedy="Give the module that it was made of (FILE.py:FACTORY), or write ONNX once: "
            "torch.onnx.export(torch.jit.load(FILE), example, 'model.onnx', dynamo=False)",
        )
    parameters = [
        one
        for one in inspect.signature(module.forward).parameters.values()
        if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)
    ]
    if not inputs:
        raise ModelError(
            "no example inputs to trace it with", where=where, remedy=f"{FORM}; or give calibration samples"
        )
    tensors = {name: torch.from_numpy(np.ascontiguousarray(_narrow(array))) for name, array in inputs.items()}
    needed = [one.name for one in parameters if one.default is one.empty]
    if len(tensors) == 1 and len(needed) <= 1:
        return Example((next(iter(tensors.values())),))
    if missing := [name for name in needed if name not in tensors]:
        raise ModelError(
            f"the samples have no array {missing[0]!r}, which its forward takes; they have {', '.join(tensors)}",
            where=where,
            remedy="Name the arrays of the data set as the arguments of forward",
        )
    return Example((), {one.name: tensors[one.name] for one in parameters if one.name in tensors})


def _narrow(array: Any) -> Any:
    """Convert float64, NumPy's default, to float32: networks hardly ever take double precision."""
    return array.astype("float32") if array.dtype == "float64" else array
