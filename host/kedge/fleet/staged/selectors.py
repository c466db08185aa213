"""Selectors of devices: ``site=berlin,target in (rpi4,rpi5),agent>=0.3,hash<10%``.

A selector is a list of terms, joined by commas; a device must meet all of them. A term asks for a label, or for a fact:

- ``name``, ``target``, ``online`` (``yes`` or ``no``);
- ``agent``, ``architecture``, ``python``, ``free_mib``, ``runtime.NAME``, ``serves.MODEL`` as the device reported;
- ``hash``: a place between 0 and 100 % that a device's name gives it, the same at any time and in any fleet.

A label of a fact's name is asked for as ``label.NAME``. Terms are ``KEY``, ``!KEY`` (there is none), ``KEY=VALUE``,
``KEY!=VALUE``, ``KEY in (A,B)``, ``KEY not in (A,B)``, and ``<``, ``<=``, ``>``, ``>=``, which compare as versions do:
0.10 is larger than 0.9.
"""

from __future__ import annotations

import hashlib
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kedge_protocol.errors import ConfigError, FleetError
from kedge_protocol.spelling import known_names

HASH = "hash"
_KNOWN = ("name", "target", "online")
_REPORTED = ("agent", "architecture", "python", "free_mib")
_REPORTED_OF = ("runtime.", "serves.")
_KEY = r"[A-Za-z0-9][A-Za-z0-9._\-]{0,99}"
_TERM = re.compile(rf"({_KEY})\s*(==|!=|<=|>=|=|<|>)\s*([^=<>!()\s][^=<>!()]*?)")
_SET = re.compile(rf"({_KEY})\s+(not\s+in|in)\s*\(([^()]*)\)")
_BARE = re.compile(rf"(!?)\s*({_KEY})")
_PERCENT = re.compile(r"(\d{1,3}(?:\.\d+)?)\s*%")
_COMMA = re.compile(r",(?![^(]*\))")
_EARLY = {"dev": -4, "a": -3, "alpha": -3, "b": -2, "beta": -2, "c": -1, "rc": -1, "pre": -1, "preview": -1}
"""What comes before a release, in the order of PEP 440."""
_ORDERED: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass(frozen=True, kw_only=True)
class Properties:
    """What a selector can ask a device for.

    Attributes:
        facts: by the names of this module; one that is not known is missing.
    """

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)

    def value(self, key: str) -> str | None:
        """Return a fact or a label; None for neither."""
        if key.startswith("label."):
            return self.labels.get(key[len("label.") :])
        return self.name if key == "name" else self.facts.get(key, None if is_fact(key) else self.labels.get(key))


@dataclass(frozen=True, kw_only=True)
class Term:
    """One condition: ``operation`` is ``=``, ``!=``, ``in``, ``not in``, ``<``, ``<=``, ``>``, ``>=``, ``is`` or
    ``is not`` (of a key that is there)."""

    key: str
    operation: str
    values: tuple[str, ...] = ()

    def holds(self, device: Properties) -> bool:
        """Return whether a device meets it."""
        if self.key == HASH:
            return _ORDERED[self.operation](place(device.name), float(self.values[0]) / 100)
        value = device.value(self.key)
        if self.operation in ("is", "is not"):
            return (value is not None) == (self.operation == "is")
        if self.operation in ("=", "in"):
            return value in self.values
        if self.operation in ("!=", "not in"):
            return value not in self.values
        return value is not None and _ORDERED[self.operation](_version(value), _version(self.values[0]))


@dataclass(frozen=True, kw_only=True)
class Selector:
    """A parsed selector; without terms it selects every device."""

    terms: tuple[Term, ...] = ()

    @property
    def asks_reports(self) -> bool:
        """Whether it needs what the devices reported."""
        return any(term.key in _REPORTED or term.key.startswith(_REPORTED_OF) for term in self.terms)

    def matches(self, device: Properties) -> bool:
        """Return whether a device meets all terms."""
        return all(term.holds(device) for term in self.terms)

    def check_keys(self, devices: Iterable[Properties]) -> None:
        """Refuse a key that no device has: it is misspelt, or nothing would ever be selected by it.

        Raises:
            FleetError: there is one; the message says what may have been meant.
        """
        asked = {term.key for term in self.terms if not is_fact(term.key)}
        labels = {key for device in devices for key in device.labels}
        for key in sorted(asked):
            if (name := key.removeprefix("label.")) not in labels:
                raise FleetError(
                    f"no device has a label {name!r}",
                    remedy=known_names(name, sorted({*labels, *_KNOWN, *_REPORTED, HASH})),
                )


def parse(text: str) -> Selector:
    """Parse a selector; empty text selects every device.

    Raises:
        ConfigError: a term cannot be read.
    """
    parts = [part.strip() for part in _COMMA.split(text)] if text.strip() else []
    return Selector(terms=tuple(_term(part) for part in parts))


def _term(text: str) -> Term:
    if found := _SET.fullmatch(text):
        values = tuple(value for one in found[3].split(",") if (value := one.strip()))
        return _checked(Term(key=found[1], operation=" ".join(found[2].split()), values=values), text)
    if found := _TERM.fullmatch(text):
        return _checked(Term(key=found[1], operation={"==": "="}.get(found[2], found[2]), values=(found[3],)), text)
    if found := _BARE.fullmatch(text):
        return _checked(Term(key=found[2], operation="is not" if found[1] else "is"), text)
    raise ConfigError(
        f"the selector's term {text!r} cannot be read",
        remedy="Terms are KEY=VALUE, KEY!=VALUE, KEY in (A,B), KEY not in (A,B), KEY>=VERSION, KEY, !KEY, hash<10%,"
        " joined by commas",
    )


def _checked(term: Term, text: str) -> Term:
    if term.key != HASH:
        if term.operation in ("in", "not in") and not term.values:
            raise ConfigError(f"the selector's term {text!r} names no value")
        return term
    percent = _PERCENT.fullmatch(term.values[0]) if term.values else None
    if term.operation not in _ORDERED or percent is None or not 0 <= float(percent[1]) <= 100:
        raise ConfigError(f"the selector's term {text!r} cannot be read", remedy="Write hash<10% or hash>=10%")
    return Term(key=HASH, operation=term.operation, values=(percent[1],))


def is_fact(key: str) -> bool:
    """Return whether a key is the name of a fact, not of a label."""
    return key in _KNOWN or key in _REPORTED or key == HASH or key.startswith(_REPORTED_OF)


def place(name: str, seed: str = "") -> float:
    """Return a device's place in [0, 1): uniform over names, and the same for one name and seed for ever."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big") / (1 << 56)


def _version(text: str) -> tuple[tuple[int, int], ...]:
    """The numbers in order; what comes before a release (0.3rc1, 0.3.dev2) is smaller than the release."""
    read: list[tuple[int, int]] = []
    for part in re.findall(r"\d+|[a-z]+", text.lower()):
        if part.isdigit():
            read.append((1, int(part)))
        elif part in _EARLY:
            read = [*_without_zeros(read), (_EARLY[part], 0)]
    return (*_without_zeros(read), (0, 0))


def _without_zeros(numbers: list[tuple[int, int]]) -> list[tuple[int, int]]:
    while numbers and numbers[-1] == (1, 0):
        numbers = numbers[:-1]
    return numbers
