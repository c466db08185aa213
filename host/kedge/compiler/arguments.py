"""The keyword arguments of :func:`kedge.compile`: each is a field of :class:`CompileOptions`, which explains it."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import inspect
import numbers
import os
import reprlib
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypedDict

import numpy as np

from kedge import options
from kedge.search.options import CompileOptions
from kedge_protocol.errors import ConfigError
from kedge_protocol.spelling import known_names

PathLike: TypeAlias = "str | os.PathLike[str]"


class RequiredArguments(TypedDict):
    """The keyword arguments without a default."""

    name: str
    version: str
    targets: Sequence[str]
    calibration: PathLike | Iterable[Any]
    evaluation: PathLike | Iterable[Any]
    out: PathLike


class CompileArguments(RequiredArguments, total=False):
    """The keyword arguments for type checkers: names and types; :class:`CompileOptions` has the defaults and
    meanings."""

    max_drop: float
    min_agreement: float | None
    confidence: float | None
    max_size: str | int | None
    max_latency: float | None
    effort: str
    time_limit: float | None
    recipe: PathLike | None
    step: Sequence[str]
    quantize: str | None
    preprocess: str | Sequence[str] | None
    task: str | None
    pipeline: PathLike | None
    calibration_samples: int | None
    evaluation_samples: int | None
    metric: str | None
    annotations: PathLike | None
    loss: str | None
    labels: PathLike | None
    deadline: float
    memory_limit: int | None
    force: bool
    batch: int | None
    trust_pickle: bool
    batch_axes: Mapping[str, int | None] | None
    states: Mapping[str, str] | None
    seed: int | None
    jobs: int | None
    checkpoints: PathLike | None
    latencies: PathLike | None
    every_backend: bool
    scheduler: str | None
    target_fps: float | None
    max_utilization: float | None
    bitfile: PathLike | None
    max_perplexity: str | None
    max_kl: float | None
    choices: PathLike | None
    max_memory: str | int | None
    min_tokens_per_second: float | None
    context: int | None
    slots: int | None
    cache: str | None
    split: int | None
    adapter: PathLike | None


_MAPPINGS = {"batch_axis": "batch_axes", "state": "states"}
"""Options that are repeated as ``NAME=VALUE`` in the shell → their name in Python, where they are a mapping."""


def parameters() -> list[inspect.Parameter]:
    """Return the keyword arguments in the order of the options, with their defaults."""
    found = []
    for field in dataclasses.fields(CompileOptions):
        name = _MAPPINGS.get(field.name, field.name)
        default = field.default.value if isinstance(field.default, enum.Enum) else field.default
        if name != field.name:
            default = None
        found.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if default is dataclasses.MISSING else default,
                annotation=(CompileArguments.__annotations__ | RequiredArguments.__annotations__)[name].__forward_arg__,
            )
        )
    return found


def described() -> str:
    """Return a line for each argument, for the docstring."""
    texts = options.texts(CompileOptions).items()
    return "\n".join(f"        {_MAPPINGS.get(name, name)}: {text}" for name, text in texts)


def to_options(arguments: Mapping[str, Any]) -> CompileOptions:
    """Return the options of a compilation; paths, texts and sequences may come in any form that the types allow.

    Raises:
        ConfigError: a value is not of its option's type; the message names the option and what it takes.
    """
    hints = typing.get_type_hints(CompileOptions)
    given = {}
    for field, name in ((one, _MAPPINGS.get(one.name, one.name)) for one in dataclasses.fields(CompileOptions)):
        if name not in arguments:
            continue
        value = arguments[name]
        if name != field.name:
            value = _entries(value, where=name)
        given[field.name] = _converted(hints[field.name], value, where=name)
    return CompileOptions(**given)


def _entries(value: Any, *, where: str) -> list[str]:
    """Return a mapping as the shell's repeated ``NAME=VALUE``."""
    if value is None:
        return []
    if not isinstance(value, Mapping):
        raise _refused(value, "mapping", "Give a dictionary by tensors' names", where)
    return [f"{key}={'none' if entry is None else entry}" for key, entry in value.items()]


def _converted(hint: Any, value: Any, *, where: str) -> Any:
    kinds = typing.get_args(hint) or (hint,)
    if typing.get_origin(hint) is tuple:
        return _texts(value, where=where)
    if value is None and type(None) in kinds:
        return None
    kind = kinds[0]
    if issubclass(kind, enum.Enum):
        return _member(kind, value, where=where)
    plain = value.item() if isinstance(value, np.generic) else value
    taken, what, remedy = _TAKEN[kind]
    # A bool is an int to Python, but as a number it is a mistake.
    if isinstance(plain, taken) and (kind is bool or not isinstance(plain, bool)):
        with contextlib.suppress(OverflowError):
            return kind(plain)
    raise _refused(value, what, remedy, where)


_TAKEN: dict[type, tuple[tuple[type, ...], str, str]] = {
    bool: ((bool,), "truth value", "Give True or False"),
    int: ((numbers.Integral,), "whole number", "Give an int, a text is not read as one"),
    float: ((numbers.Real,), "number", "Give a float or an int, a text is not read as one"),
    str: ((str, os.PathLike, numbers.Real), "text", "Give a str"),
    Path: ((str, os.PathLike), "path", "Give a str or a pathlib.Path"),
}
"""Type of an option → what it takes in Python, its name, and what to do instead."""


def _texts(value: Any, *, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    several = isinstance(value, Iterable) and not isinstance(value, (str, os.PathLike, bytes, Mapping))
    found = list(value) if several else [value]
    if not all(isinstance(one, (str, os.PathLike)) for one in found):
        raise _refused(value, "text, nor several", "Give a str or a list of them", where)
    return tuple(os.fspath(one) for one in found)


def _member(kind: type[enum.Enum], value: Any, *, where: str) -> enum.Enum:
    try:
        return kind(value)
    except ValueError as error:
        remedy = known_names(str(value), [one.value for one in kind])
        raise ConfigError(f"{value!r} is no {kind.__name__.lower()}", where=where, remedy=remedy) from error


def _refused(value: object, what: str, remedy: str, where: str) -> ConfigError:
    return ConfigError(f"{reprlib.repr(value)} is no {what}", where=where, remedy=remedy)
