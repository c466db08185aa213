"""Turns a PyTorch module into an exported program (``torch.export``), and that into an ONNX graph (``torch.onnx``).

Only imported inside functions. The batch stays free if the module allows it; other axes are free if the user named
them, in the terms of ``torch.export`` (``dynamic_shapes``).
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kedge.importing import axes
from kedge_protocol.errors import MissingDependencyError, ModelError, UnsupportedOperatorError
from kedge_protocol.packages import pip_install

OPSET = 20
"""Supported by every toolchain (`docs/decisions/011-importing-models.md`)."""

_TRACED_BATCH = 2  # of one sample a tracer takes "one" for a property of the model
_UNKNOWN = re.compile(r"No (?:ONNX function|decompositions) (?:found|registered) for (?:<OpOverload\(op=')?([\w.:]+)")
_NODE = re.compile(r"Failure when translating node %?(\w+)|translating node (\w+)")


@dataclass(frozen=True)
class Example:
    """The inputs that a module is called with.

    Attributes:
        args, kwargs: tensors, or nested lists, tuples and dicts of them.
        free: argument name → axis → name of the axis, for axes that are free besides the batch.
        longest: name of an axis → its maximum length.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    free: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    longest: Mapping[str, int] = field(default_factory=dict)

    def with_batch(self, samples: int) -> Example:
        """Return the same example with this many samples, repeating the first ones."""

        def sized(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or value.ndim == 0 or len(value) == samples:
                return value
            return torch.cat([value] * -(-samples // len(value)))[:samples].contiguous()

        return Example(_mapped(sized, self.args), _mapped(sized, self.kwargs), self.free, self.longest)


@dataclass(frozen=True)
class Program:
    """An exported program and the decisions made on the way."""

    program: Any
    notes: tuple[str, ...]
    names: Mapping[str, str] = field(default_factory=dict)
    """Symbols of axes → the user's names."""


@contextlib.contextmanager
def evaluation_mode(module: torch.nn.Module) -> Iterator[None]:
    """Put the module into inference mode, and restore its modes afterwards."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes.items():
            part.training = training


def export_program(module: torch.nn.Module, example: Example, *, batch: int | None, where: str) -> Program:
    """Trace a module; call this within :func:`evaluation_mode`.

    Args:
        batch: the batch to fix; None to leave it free.

    Raises:
        ModelError: the module's forward raises on the example or cannot be traced.
    """
    if batch is not None:
        return _with(module, example.with_batch(batch), {}, (f"batch fixed to {batch} on request",), where)
    try:
        return _with(module, example.with_batch(_TRACED_BATCH), {0: axes.BATCH}, (), where)
    except ModelError as error:
        reason = error.what
    return _with(module, example.with_batch(1), {}, (f"batch fixed to 1, because {reason}",), where)


def _with(
    module: torch.nn.Module, example: Example, shared: Mapping[int, str], notes: tuple[str, ...], where: str
) -> Program:
    example = _called(module, example, where)
    program = _traced(module, example, shared, where)
    return Program(program, notes, _symbols(program, example.free))


def _symbols(program: Any, free: Mapping[str, Mapping[int, str]]) -> dict[str, str]:
    """Return the tracer's symbols of the axes that the user named."""
    shapes = {node.name: node.meta["val"].shape for node in program.graph.nodes if node.op == "placeholder"}
    return {
        str(shapes[name][axis]): text for name, named in free.items() if name in shapes for axis, text in named.items()
    }


def _called(module: torch.nn.Module, example: Example, where: str) -> Example:
    """Return the example as the module takes it: integers (raw pixels) are converted to float if they fail."""
    try:
        module(*example.args, **example.kwargs)
        return example
    except Exception as error:  # noqa: BLE001 -- it is raised below, unless floats help
        first = error
    floats = Example(_mapped(_float, example.args), _mapped(_float, example.kwargs), example.free, example.longest)
    with contextlib.suppress(Exception):
        module(*floats.args, **floats.kwargs)
        return floats
    raise ModelError(
        f"its forward raises {type(first).__name__} on the example inputs: {_one_line(first)}",
        where=where,
        remedy="Let the factory return (module, example_inputs), or see that the samples are what the module takes",
    ) from first


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) else value


def _traced(module: torch.nn.Module, example: Example, shared: Mapping[int, str], where: str) -> Any:
    """Trace with the example's free axes and the axes ``shared`` by all inputs free."""
    known: dict[str, Any] = {}
    shapes = torch.export.ShapesCollection()
    for name, tensor in _tensors(module, example):
        named = {**{axis: text for axis, text in shared.items() if tensor.ndim}, **example.free.get(name, {})}
        dims = {
            axis: known.setdefault(text, torch.export.Dim(text, max=example.longest.get(text)))
            for axis, text in named.items()
        }
        if dims:
            shapes[tensor] = dims
    try:
        return torch.export.export(module, example.args, example.kwargs, dynamic_shapes=shapes if known else None)
    except Exception as error:
        raise ModelError(
            f"torch.export cannot trace it: {_one_line(error)}",
            where=where,
            remedy="Export it yourself with torch.export.export and torch.export.save, and give the .pt2",
        ) from error


def _tensors(module: torch.nn.Module, example: Example) -> list[tuple[str, torch.Tensor]]:
    """Return the tensors of an example, each with the name of its argument."""
    arguments = {**dict(zip(argument_names(module, len(example.args)), example.args, strict=True)), **example.kwargs}
    found = []
    for name, value in arguments.items():
        leaves, _ = torch.utils._pytree.tree_flatten(value)
        found += [(name, leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return found


def argument_names(module: torch.nn.Module, count: int) -> list[str]:
    """Return the names of the first ``count`` positional arguments of a module's forward."""
    import inspect

    parameters = inspect.signature(module.forward).parameters.values()
    names = [one.name for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    return [*names, *(f"input_{at}" for at in range(len(names), count))][:count]


def to_onnx(
    made: Program,
    path: Path,
    *,
    where: str,
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
) -> tuple[str, ...]:
    """Write an exported program as ONNX and return the names of its free axes.

    Args:
        path: the new file.
        inputs, outputs: names; by default the arguments' names, and ``output`` or the keys of the returned dict.

    Raises:
        UnsupportedOperatorError: an operator has no counterpart in ONNX; names it and its node.
        ModelError: the program cannot be exported.
    """
    import onnx

    from kedge_targets.graph import model_writer

    taken = list(inputs or input_names(made.program))
    given = list(outputs or output_names(made.program))
    try:
        with _quiet():
            written = torch.onnx.export(
                made.program,
                None,
                input_names=taken,
                output_names=given,
                opset_version=OPSET,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
            written.save(str(path))
    except ImportError as error:
        raise MissingDependencyError(
            f"exporting to ONNX needs {error.name}", remedy=f"Install it with {pip_install('compile')}"
        ) from error
    except Exception as error:
        raise _refused(error, where) from error
    model = onnx.load_model(str(path))
    free = axes.rename_axes(model, made.names)
    model_writer.strip(model)
    model_writer.save(model, path)
    return free


def input_names(program: Any) -> list[str]:
    """Return the names of the tensors that a program takes; its other arguments became constants."""
    return [name for name in program.graph_signature.user_inputs if isinstance(name, str)]


def output_names(program: Any) -> list[str]:
    """Return the output names: ``output`` if there is one, the keys if a dict is returned, otherwise ``output_0`` …"""
    count = len(program.graph_signature.user_outputs)
    spec = program.call_spec.out_spec
    keys = spec.context if spec is not None and spec.type is dict else None
    if keys is not None and len(keys) == count:
        return [str(key) for key in keys]
    return ["output"] if count == 1 else [f"output_{at}" for at in range(count)]


def answers(program: Any, feed: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
    """Run an exported program on flat inputs, in the order of :func:`input_names`, and return its outputs."""
    flat = iter(torch.from_numpy(np.ascontiguousarray(array)) for array in feed)
    taken = program.graph_signature.user_inputs
    originals, spec = torch.utils._pytree.tree_flatten(program.example_inputs)
    leaves = [
        next(flat) if isinstance(name, str) else original for name, original in zip(taken, originals, strict=True)
    ]
    args, kwargs = torch.utils._pytree.tree_unflatten(leaves, spec)
    with torch.no_grad():
        made = program.module()(*args, **kwargs)
    return [np.asarray(leaf.detach().cpu()) for leaf in torch.utils._pytree.tree_flatten(made)[0]]


def example_arrays(program: Any) -> list[np.ndarray[Any, Any]]:
    """Return the example that a program was traced with, flattened."""
    leaves, _ = torch.utils._pytree.tree_flatten(program.example_inputs)
    return [np.asarray(leaf.detach().cpu()) for leaf in leaves if isinstance(leaf, torch.Tensor)]


def tools() -> dict[str, str]:
    """Return the versions of the packages that export the model."""
    import importlib.metadata

    return {name: importlib.metadata.version(name) for name in ("torch", "onnxscript")}


def _mapped(function: Any, value: Any) -> Any:
    return torch.utils._pytree.tree_map(function, value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the warning, given at each export, that torchvision is not installed."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _refused(error: Exception, where: str) -> ModelError:
    text = _chain(error)
    if unknown := _UNKNOWN.search(text):
        node = _NODE.search(text)
        name = next((part for part in node.groups() if part), None) if node else None
        return UnsupportedOperatorError(
            f"operator {unknown[1]!r} has no counterpart in ONNX",
            where=f"{where}: node {name!r}" if name else where,
            remedy="Write that part of the module with other operators",
        )
    return ModelError(
        f"torch.onnx cannot export it: {_one_line(error)}",
        where=where,
        remedy="Export it to ONNX yourself and give the .onnx file",
    )


def _chain(error: BaseException | None) -> str:
    parts = []
    while error is not None:
        parts.append(str(error))
        error = error.__cause__ or error.__context__
    return "\n".join(parts)


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (" ".join(lines[:4]) or type(error).__name__)[:400]
