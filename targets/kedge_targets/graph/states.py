"""Finds states: inputs that take an output of the previous call (the hidden state of a recurrent network)."""

from __future__ import annotations

import re
from collections.abc import Mapping

from kedge_protocol.errors import ConfigError
from kedge_targets.graph.signature import TensorInfo

_IN = re.compile(
    r"^(?:past|prev(?:ious)?|old|init(?:ial)?|in(?:put)?)_|_(?:in(?:put)?|prev(?:ious)?|past|old|init|0)$|0$"
)
_OUT = re.compile(
    r"^(?:present|new|next|out(?:put)?|updated?)_|_(?:out(?:put)?|new|next|present|updated?|n)$|(?<=[a-z])(?:N|n|1)$"
)


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
    stems: dict[str, list[TensorInfo]] = {}
    for info in outputs:
        stem = _OUT.sub("", info.name)
        if stem != info.name:
            stems.setdefault(stem.lower(), []).append(info)
    found: dict[str, str] = {}
    for info in inputs:
        fitting = [
            other
            for stem in {info.name.lower(), _IN.sub("", info.name).lower()}
            for other in stems.get(stem, [])
            if _alike(info, other)
        ]
        if len(fitting) == 1 and fitting[0].name not in found.values():
            found[info.name] = fitting[0].name
    return found if len(found) < len(inputs) else {}


def _alike(one: TensorInfo, other: TensorInfo) -> bool:
    if one.dtype != other.dtype or len(one.shape) != len(other.shape):
        return False
    return all(a == b or a is None or b is None for a, b in zip(one.shape, other.shape, strict=True))


def _words(info: TensorInfo) -> str:
    return "x".join("?" if axis is None else str(axis) for axis in info.shape)
