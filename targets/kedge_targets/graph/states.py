"""Finds states: inputs that take an output of the previous call (the hidden state of a recurrent network)."""

from __future__ import annotations

import re
from collections.abc import Mapping

from kedge_protocol.errors import ConfigError
from kedge_targets.graph.signature import TensorInfo

_IN = re.compile(r"^(?:past|prev(?:ious)?|old|init(?:ial)?|in(?:put)?)_|_(?:in(?:put)?|prev(?:ious)?|past|old|init)$")
_OUT = re.compile(r"^(?:present|new|next|out(?:put)?|updated?|r)_|_(?:out(?:put)?|new|next|present|updated?)$")
"""Words before or behind a name that tell the two sides of a state (``r_`` is WeNet's)."""
_FIRST = re.compile(r"_?0$")
_LAST = re.compile(r"_n$|(?<=[a-z])(?:N|n|1)$")
"""How papers write it: ``h0`` and ``hn``, ``state`` and ``stateN``."""


def find(inputs: list[TensorInfo], outputs: list[TensorInfo], *, declared: Mapping[str, str]) -> dict[str, str]:
    """Pairs of input and output that are one state: those that the user declares; without any, those whose names tell
    (``state`` and ``stateN``, ``h`` and ``hn``, ``h_in`` and ``h_out``, ``past_x`` and ``present_x``) and whose dtype,
    rank and known axes are the same.

    Raises:
        ConfigError: a declared name is no input or output, or the two have different shapes or dtypes.
    """
    taken, given = {info.name: info for info in inputs}, {info.name: info for info in outputs}
    for name, other in declared.items():
        for one, there, kind in ((name, taken, "input"), (other, given, "output")):
            if one not in there:
                raise ConfigError(
                    f"{one!r} is no {kind} of the model", where="--state", remedy=f"It has {', '.join(there)}"
                )
        if not _alike(taken[name], given[other]):
            raise ConfigError(
                f"{name!r} and {other!r} have different shapes or dtypes: "
                f"{taken[name].dtype} {_words(taken[name])}, {given[other].dtype} {_words(given[other])}",
                where="--state",
                remedy="A state goes in as it comes out",
            )
    if declared or len(inputs) < 2:
        return dict(declared)
    return _named(inputs, outputs)


def _named(inputs: list[TensorInfo], outputs: list[TensorInfo]) -> dict[str, str]:
    found: dict[str, str] = {}
    for info in inputs:
        # What is told by words comes before what digits tell: of several states ``state1`` is no ``state`` at its end.
        levels = zip(*(_stems_out(other.name) for other in outputs), strict=True)
        for ins, outs in zip(_stems_in(info.name), levels, strict=True):
            pairs = zip(outputs, outs, strict=True)
            fitting = [other for other, stem in pairs if stem is not None and stem in ins and _alike(info, other)]
            if fitting:
                if len(fitting) == 1 and fitting[0].name not in found.values():
                    found[info.name] = fitting[0].name
                break
    return found if len(found) < len(inputs) else {}


def _stems_in(name: str) -> tuple[set[str], set[str], set[str]]:
    """Return what an input may be called without what tells its side, the surest first."""
    plain, short = name.lower(), _IN.sub("", name).lower()
    return {plain}, {short}, {plain, short, _FIRST.sub("", name).lower(), _FIRST.sub("", short).lower()}


def _stems_out(name: str) -> tuple[str | None, str | None, str | None]:
    """Return the same of an output; None where nothing tells its side."""
    words, digits = _OUT.sub("", name), _LAST.sub("", name)
    by_word = None if words == name else words.lower()
    return by_word, by_word, None if digits == name else digits.lower()


def _alike(one: TensorInfo, other: TensorInfo) -> bool:
    if one.dtype != other.dtype or len(one.shape) != len(other.shape):
        return False
    return all(a == b or a is None or b is None for a, b in zip(one.shape, other.shape, strict=True))


def _words(info: TensorInfo) -> str:
    return "x".join("?" if axis is None else str(axis) for axis in info.shape)
