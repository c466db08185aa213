"""One definition of an option: a field of a step's dataclass. The command line is derived from it, so that Python and
the shell take the same names, defaults and help::

    @dataclass(frozen=True, kw_only=True)
    class Options:
        out: Annotated[Path, Option("The folder that is made.", short="-o")]
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

_KINDS: dict[Any, Any] = {str: str, int: int, float: float, bool: bool, Path: Path}


@dataclass(frozen=True)
class Option:
    """What makes a dataclass field a command-line option; without a default it is required.

    Attributes:
        text: one line for ``--help`` and for readers of the dataclass.
        flag: the long option where it differs from the field's name (``targets`` → ``--target``).
        short: e.g. ``-o``.
        metavar: what stands for the value in ``--help``.
    """

    text: str
    flag: str | None = None
    short: str | None = None
    metavar: str | None = None


def _kind(annotation: Any) -> tuple[Any, bool]:
    """``(type, whether several)``: ``X | None`` is X, ``tuple[X, ...]`` is several of X."""
    arguments = [a for a in typing.get_args(annotation) if a is not type(None)]
    if typing.get_origin(annotation) is tuple:
        return _KINDS[arguments[0]], True
    return _KINDS[arguments[0] if arguments else annotation], False


def _declared(cls: type[Any]) -> list[tuple[dataclasses.Field[Any], Any, Option]]:
    hints = typing.get_type_hints(cls, include_extras=True)
    found = []
    for field in dataclasses.fields(cls):
        annotation, *extras = typing.get_args(hints[field.name]) or (hints[field.name],)
        found += [(field, annotation, extra) for extra in extras if isinstance(extra, Option)]
    return found


def command_line(cls: type[Any]) -> Callable[[F], F]:
    """A decorator that gives a click command one option for each field of ``cls`` that is annotated with one."""
    import click

    def decorate(function: F) -> F:
        for field, annotation, option in reversed(_declared(cls)):
            kind, several = _kind(annotation)
            required = field.default is dataclasses.MISSING
            long = option.flag or "--" + field.name.replace("_", "-")
            settings: dict[str, Any] = {"required": required, "help": option.text}
            if kind is bool:
                settings["is_flag"] = True
            else:
                settings |= {"type": kind, "multiple": several, "metavar": option.metavar}
            if not required:
                settings |= {"default": field.default, "show_default": field.default not in (None, (), False)}
            names = [option.short, long] if option.short else [long]
            function = click.option(*names, field.name, **settings)(function)
        return function

    return decorate


def made(cls: type[T], values: Mapping[str, Any]) -> T:
    """An instance of ``cls`` from what click parsed; ``values`` may hold other names too."""
    names = {field.name for field in dataclasses.fields(typing.cast(Any, cls))}
    return cls(**{name: value for name, value in values.items() if name in names})
