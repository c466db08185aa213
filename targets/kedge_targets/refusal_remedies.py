"""Suggests what to do about a file that a runtime refuses, based on the runtime's message."""

from __future__ import annotations

import re

_UNREADABLE = re.compile(
    r"protobuf|pars(e|ing)|truncat|corrupt|unexpected end|ir version|till opset|not a valid|unable to read|magic|xml|"
    r"is null/empty|could not open|identifier|newer model",
    re.IGNORECASE,
)


def remedy(reason: str) -> str:
    """Return the remedy for a refusal. It calls a file damaged only if the runtime could not read it."""
    if _UNREADABLE.search(reason):
        return "The file is damaged, or made for another version"
    return "Its kernels do not take this graph: leave the node that is named in float32, or export another form of it"
