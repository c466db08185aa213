"""What to do about a file that a runtime refuses, told from the runtime's own words."""

from __future__ import annotations

import re

_UNREADABLE = re.compile(
    r"protobuf|pars(e|ing)|truncat|corrupt|unexpected end|ir version|till opset|not a valid|unable to read|magic|xml",
    re.IGNORECASE,
)


def remedy(reason: str) -> str:
    """Of a refusal. That a file is damaged is said only where the runtime could not read it."""
    if _UNREADABLE.search(reason):
        return "The file is damaged, or made for another version"
    return "Its kernels do not take this graph: leave the node that is named in float32, or export another form of it"
