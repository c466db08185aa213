"""Typed views of plain data: frozen dataclasses, read strictly.

The views need only a few kinds of types (see :func:`_reader`), so no library is used: one would cost every process of
an agent 4 MiB and 60 ms at startup (decision 002).
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any, TypeVar

from kedge_protocol import spelling
from kedge_protocol.errors import ConfigError, MessageError

T = TypeVar("T")


def named(json_name: str, **options: Any) -> Any:
    """Return a dataclass field whose name in JSON differs (``media_type`` / ``mediaType``)."""
    return dataclasses.field(metadata={"json": json_name}, **options)


class _ProblemsError(Exception):
    """The problems of invalid plain data: the place of each, seen from the value that was read, and what is wrong."""

    def __init__(self, found: list[tuple[str, str]]) -> None:
        super().__init__(*found)
        self.found = found

    def within(self, place: str) -> list[tuple[str, str]]:
        """Return the problems as seen from the value that holds this one at ``place``."""
        return [(place + inner, what) for inner, what in self.found]


_Reader = Callable[[Any, bool], Any]
"""(plain value, whether unknown keys are errors) → typed value, or raises :class:`_ProblemsError`."""
_PLAIN = frozenset({str, int, float, bool, types.NoneType})
_KEYS = frozenset({str})
_AS_THEY_ARE = frozenset({str, int, bool})
"""Types whose values are taken over unread: most of a message are counts by bucket."""


def _came(value: Any) -> str:
    """Return a description of the unexpected value: its type alone does not help the reader find it."""
    if value is None:
        return "nothing"
    try:
        text = repr(value)[:80]
    except ValueError:  # Python writes no integer of more than 4300 digits in decimal.
        text = "of thousands of digits"
    return f"the {type(value).__name__} {text}"


@functools.cache
def _reader(of: Any) -> _Reader:
    """Return the reader of a type: str, int, float, bool, enumerations of them, paths, Any, dataclasses, lists, tuples
    of any length, dictionaries with string keys, and any of these or None."""
    origin = typing.get_origin(of)
    arguments = typing.get_args(of)
    if of is Any:
        return lambda value, strict: value
    if origin in (typing.Union, types.UnionType):
        return _optional(*(argument for argument in arguments if argument is not types.NoneType))
    if origin in (list, tuple):
        return _sequence(origin, arguments[0])
    if origin in (dict, Mapping):
        return _mapping(arguments[1])
    if isinstance(of, type) and issubclass(of, enum.Enum):
        return _enumeration(of)
    if dataclasses.is_dataclass(of) and isinstance(of, type):
        return _view(of)
    return _scalar(of)


def _scalar(of: type) -> _Reader:
    accepted = {float: (float, int), Path: (str,)}.get(of, (of,))
    is_float = of is float

    def read(value: Any, strict: bool) -> Any:
        if type(value) is of and not is_float:
            return value
        # bool is an int to Python, not to a reader of JSON.
        if not isinstance(value, accepted) or (isinstance(value, bool) and of is not bool):
            raise _ProblemsError([("", f"{of.__name__} was expected, not {_came(value)}")])
        try:
            typed = of(value)
        except OverflowError:
            raise _ProblemsError([("", f"{_came(value)} is too large")]) from None
        # A document that was received holds no such number (codec.loads); what the worker measured may.
        if strict and is_float and not math.isfinite(typed):
            raise _ProblemsError([("", f"a finite number was expected, not {typed}")])
        return typed

    return read


def _enumeration(of: type[enum.Enum]) -> _Reader:
    def read(value: Any, strict: bool) -> Any:
        try:
            return of(value)
        except ValueError:
            known = ", ".join(str(member.value) for member in of)
            raise _ProblemsError([("", f"{str(value)[:80]!r} is none of {known}")]) from None

    return read


def _optional(of: Any) -> _Reader:
    inner = _reader(of)
    return lambda value, strict: None if value is None else inner(value, strict)


def _sequence(make: Callable[[list[Any]], Any], of: Any) -> _Reader:
    inner = _reader(of)

    def read(value: Any, strict: bool) -> Any:
        if not isinstance(value, (list, tuple)):
            raise _ProblemsError([("", f"a list was expected, not {_came(value)}")])
        try:
            return make([inner(item, strict) for item in value])
        except _ProblemsError:
            raise _each_problem(inner, ((f"[{i}]", item) for i, item in enumerate(value)), strict) from None

    return read


def _mapping(of: Any) -> _Reader:
    inner = _reader(of)

    def read(value: Any, strict: bool) -> Any:
        if type(value) is dict and set(map(type, value)) <= _KEYS:
            if of in _AS_THEY_ARE and set(map(type, value.values())) <= {of}:
                return value.copy()
        elif not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise _ProblemsError([("", f"an object was expected, not {_came(value)}")])
        try:
            return {key: inner(item, strict) for key, item in value.items()}
        except _ProblemsError:
            raise _each_problem(inner, ((f"[{key!r}]", item) for key, item in value.items()), strict) from None

    return read


def _each_problem(inner: _Reader, items: Iterable[tuple[str, Any]], strict: bool) -> _ProblemsError:
    """Return the problems of all items; they are read again, since the first one ended the reading."""
    problems: list[tuple[str, str]] = []
    for place, item in items:
        try:
            inner(item, strict)
        except _ProblemsError as error:
            problems += error.within(place)
    return _ProblemsError(problems)


@functools.cache
def _names(of: type) -> dict[str, tuple[str, Any, bool]]:
    """Return name in JSON → name of the field, its type, and whether it is required."""
    hints = typing.get_type_hints(of)
    return {
        field.metadata.get("json", field.name): (
            field.name,
            hints[field.name],
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING,
        )
        for field in dataclasses.fields(of)
        if field.init
    }


@functools.cache
def _fields(of: type) -> tuple[tuple[str, str, _Reader, bool], ...]:
    """Return name in JSON, name of the field, its reader, and whether it is required."""
    return tuple((key, field, _reader(kind), needed) for key, (field, kind, needed) in _names(of).items())


def _meant(key: Any, names: Iterable[str]) -> str:
    near = spelling.nearest(str(key), names)
    return "" if near is None else f" (did you mean {near!r}?)"


def _view(of: type) -> _Reader:
    def read(value: Any, strict: bool) -> Any:
        if type(value) is not dict and not isinstance(value, Mapping):
            raise _ProblemsError([("", f"an object was expected, not {_came(value)}")])
        problems: list[tuple[str, str]] = []
        if strict:
            names = _names(of)
            problems += [(f".{key}", f"unknown{_meant(key, names)}") for key in value if key not in names]
        found = {}
        for key, field, reader, needed in _fields(of):
            if key in value:
                try:
                    found[field] = reader(value[key], strict)
                except _ProblemsError as error:
                    problems += error.within(f".{key}")
            elif needed:
                problems.append((f".{key}", "missing"))
        if problems:
            raise _ProblemsError(problems)
        return of(**found)

    return read


def structure(data: Any, cls: type[T], *, where: str, strict: bool = False) -> T:
    """Make a typed view of plain data.

    Raises:
        ConfigError: the data is invalid, with ``strict``; otherwise :class:`MessageError`. The message names each bad
            field.
    """
    try:
        reader: _Reader = _reader(cls)  # type: ignore[arg-type] # a class is hashable; typeshed asks for the protocol
        view: T = reader(data, strict)
    except _ProblemsError as error:
        kind = ConfigError if strict else MessageError
        # Whoever wrote a file knows its keys, not the class that reads it.
        problems = error.within("" if strict else cls.__name__)
        found = "; ".join(f"{place.removeprefix('.') or cls.__name__}: {what}" for place, what in problems)
        raise kind(found, where=where, remedy="Correct the named fields") from error
    return view


def unstructure(value: Any) -> Any:
    """Return a view as plain data: dicts, lists, strings and numbers; fields that are None are left out."""
    kind = type(value)
    return value if kind in _PLAIN else _writer(kind)(value)  # type: ignore[arg-type] # a class is hashable


@functools.cache
def _writer(kind: type) -> Callable[[Any], Any]:
    """Return what makes plain data of a value of this type."""
    if dataclasses.is_dataclass(kind):
        pairs = tuple((key, field) for key, (field, _, _) in _names(kind).items())
        return lambda value: {
            key: item if type(item) in _PLAIN else unstructure(item)
            for key, field in pairs
            if (item := getattr(value, field)) is not None
        }
    if issubclass(kind, enum.Enum):
        return lambda value: value.value
    if issubclass(kind, PurePath):
        return str
    if issubclass(kind, Mapping):
        return lambda value: {unstructure(key): unstructure(item) for key, item in value.items()}
    if issubclass(kind, (list, tuple)):
        return lambda value: [unstructure(item) for item in value]
    return lambda value: value
