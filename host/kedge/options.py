"""Options are fields of dataclasses. The command line is derived from them, so that Python and the shell share names,
defaults and help::

    @dataclass(frozen=True, kw_only=True)
    class Options:
        out: Annotated[Path, Option("The folder that is made.", short="-o")]
"""

from __future__ import annotations

import dataclasses
import enum
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from kedge_protocol import codec

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

_KINDS: dict[Any, Any] = {str: str, int: int, float: float, bool: bool, Path: Path}


@dataclass(frozen=True)
class Option:
    """Marks a dataclass field as a command-line option; it is required if it has no default.

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
    """``(click's type, whether several)``: ``X | None`` is X, ``tuple[X, ...]`` is several of X, an enumeration is the
    choice of its values."""
    arguments = [a for a in typing.get_args(annotation) if a is not type(None)]
    if typing.get_origin(annotation) is tuple:
        return _KINDS[arguments[0]], True
    one = arguments[0] if arguments else annotation
    if isinstance(one, type) and issubclass(one, enum.Enum):
        import click

        return click.Choice([member.value for member in one]), False
    return _KINDS[one], False


def _declared(cls: type[Any]) -> list[tuple[dataclasses.Field[Any], Any, Option]]:
    hints = typing.get_type_hints(cls, include_extras=True)
    found = []
    for field in dataclasses.fields(cls):
        annotation, *extras = typing.get_args(hints[field.name]) or (hints[field.name],)
        found += [(field, annotation, extra) for extra in extras if isinstance(extra, Option)]
    return found


def command_line(cls: type[Any]) -> Callable[[F], F]:
    """Return a decorator that gives a click command one option for each annotated field of ``cls``."""
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
                plain = field.default.value if isinstance(field.default, enum.Enum) else field.default
                settings |= {"default": plain, "show_default": plain not in (None, (), False)}
            names = [option.short, long] if option.short else [long]
            function = click.option(*names, field.name, **settings)(function)
        return function

    return decorate


def texts(cls: type[Any]) -> dict[str, str]:
    """Return the help text of each option of ``cls``, by field name."""
    return {field.name: option.text for field, _, option in _declared(cls)}


def described(cls: type[Any], name: str) -> str:
    """One option in a line: ``ratio = 0.5: Share of the channels that goes.``; an option without a text by its name."""
    for field, _, option in _declared(cls):
        if field.name == name:
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            plain = default.value if isinstance(default, enum.Enum) else default
            choices = ""
            if isinstance(default, enum.Enum):
                choices = f" One of {', '.join(str(one.value) for one in type(default))}."
            return f"{name} = {plain}: {option.text}{choices}"
    return name


def values(options: Any) -> dict[str, Any]:
    """Return the fields of an options dataclass that differ from their defaults, as plain data for TOML."""
    found = {}
    for field in dataclasses.fields(options):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        value = getattr(options, field.name)
        if value != default and value is not None:
            found[field.name] = codec.unstructure(value)
    return found


def made(cls: type[T], parsed: Mapping[str, Any]) -> T:
    """Make an instance of ``cls`` from click's parsed values, which may hold other names too."""
    hints = typing.get_type_hints(cls)
    names = {field.name for field in dataclasses.fields(typing.cast(Any, cls))}
    return cls(**{name: _typed(hints[name], value) for name, value in parsed.items() if name in names})


def _typed(annotation: Any, value: Any) -> Any:
    """click gives an enumeration's value; the dataclass wants the member."""
    for one in typing.get_args(annotation) or (annotation,):
        if isinstance(one, type) and issubclass(one, enum.Enum) and value is not None:
            return one(value)
    return value
