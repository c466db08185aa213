"""Draws JSON schemas whose values are bounded in length, so that every constrained answer ends."""

from __future__ import annotations

from typing import Any

import numpy as np

_WORDS = ("red", "green", "blue", "a b", "x-1", "true", "0", 'quo"te', "back\\slash")
_PATTERNS = ("^[a-z]{2,5}$", "^(yes|no|maybe)$", "^[0-9]{3}-[0-9]{2}$", "^[A-F]+x?$")


def draw(random: np.random.Generator) -> dict[str, Any]:
    """An object with a few members of any kind, some of them optional, some by reference."""
    schema = _object(random, depth=2)
    schema["$defs"] = {"point": {"type": "object", "properties": _xy(), "required": ["x", "y"], **_CLOSED}}
    if random.random() < 0.4:
        schema["properties"]["at"] = {"$ref": "#/$defs/point"}
        schema["required"].append("at")
    return schema


_CLOSED = {"additionalProperties": False}


def _xy() -> dict[str, Any]:
    return {name: {"type": "integer", "minimum": -99, "maximum": 99} for name in "xy"}


def _object(random: np.random.Generator, depth: int) -> dict[str, Any]:
    names = [f"m{at}" for at in range(int(random.integers(1, 5)))]
    properties = {name: _value(random, depth - 1) for name in names}
    required = [name for name in names if random.random() < 0.7]
    return {"type": "object", "properties": properties, "required": required, **_CLOSED}


def _value(random: np.random.Generator, depth: int) -> dict[str, Any]:
    kinds = ["integer", "enum", "const", "text", "pattern", "boolean", "null", "any"]
    if depth > 0:
        kinds += ["object", "array"]
    kind = kinds[int(random.integers(len(kinds)))]
    low = int(random.integers(-50, 50))
    words = [str(word) for word in random.choice(_WORDS, size=3, replace=False)]
    drawn: dict[str, dict[str, Any]] = {
        "integer": {"type": "integer", "minimum": low, "maximum": low + int(random.integers(0, 200))},
        "enum": {"enum": [*words, 7, None]},
        "const": {"const": words[0]},
        "text": {"type": "string", "minLength": 1, "maxLength": int(random.integers(1, 9))},
        "pattern": {"type": "string", "maxLength": 8, "pattern": str(random.choice(_PATTERNS))},
        "boolean": {"type": "boolean"},
        "null": {"type": "null"},
        "any": {"anyOf": [{"type": "boolean"}, {"type": "string", "maxLength": 3}]},
    }
    if kind == "object":
        return _object(random, depth)
    if kind == "array":
        most = int(random.integers(1, 4))
        least = int(random.integers(0, most + 1))
        return {"type": "array", "items": _value(random, depth - 1), "minItems": least, "maxItems": most}
    return drawn[kind]
