"""The keyword arguments of :func:`kedge.compile`: each is a field of :class:`CompileOptions`, which explains it."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import os
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypedDict

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
        ConfigError: the effort is unknown.
    """
    hints = typing.get_type_hints(CompileOptions)
    given = {}
    for field, name in ((one, _MAPPINGS.get(one.name, one.name)) for one in dataclasses.fields(CompileOptions)):
        if name not in arguments:
            continue
        value = arguments[name]
        if name != field.name:
            value = [f"{key}={'none' if entry is None else entry}" for key, entry in (value or {}).items()]
        given[field.name] = _converted(hints[field.name], value, where=name)
    return CompileOptions(**given)


def _converted(hint: Any, value: Any, *, where: str) -> Any:
    kinds = typing.get_args(hint) or (hint,)
    if typing.get_origin(hint) is tuple:
        return (value,) if isinstance(value, str) else tuple(value or ())
    if value is None:
        return None
    if Path in kinds:
        return Path(value)
    if str in kinds:
        return str(value)
    if isinstance(kinds[0], type) and issubclass(kinds[0], enum.Enum):
        return _member(kinds[0], value, where=where)
    return value


def _member(kind: type[enum.Enum], value: Any, *, where: str) -> enum.Enum:
    try:
        return kind(value)
    except ValueError as error:
        remedy = known_names(str(value), [one.value for one in kind])
        raise ConfigError(f"{value!r} is no {kind.__name__.lower()}", where=where, remedy=remedy) from error
