"""Parses steps and quantization from command line arguments: ``prune-channels:ratio=0.5,importance=taylor``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kedge.quantization.quantize_options import Quantize
from kedge.search.recipe import Recipe
from kedge_protocol import codec, toml
from kedge_protocol.errors import ConfigError, MessageError


def parse_recipe(steps: Sequence[str], quantize: str | None) -> Recipe | None:
    """Parse ``--step`` and ``--quantize`` into a recipe; None if neither is given.

    Raises:
        ConfigError: an argument cannot be read, or a step or option is unknown.
    """
    if not steps and quantize is None:
        return None
    entries = []
    for text in steps:
        use, _, rest = text.partition(":")
        entries.append({"use": use.strip(), **options(rest, where=f"--step {text}")})
    where = f"--quantize {quantize}"
    try:
        how = codec.structure(options(quantize or "", where=where), Quantize, where=where, strict=True)
    except MessageError as error:
        raise ConfigError(error.what, where=where) from error
    made = Recipe(step=tuple(entries), quantize=how)
    made.check()
    return made


def options(text: str, *, where: str) -> dict[str, Any]:
    """Parse ``a=1,b=word`` into plain data: numbers, booleans, lists and tables as in TOML; anything else is a string.

    Raises:
        ConfigError: a part has no ``=``, or an option is given twice.
    """
    found: dict[str, Any] = {}
    for part in _parts(text) if text.strip() else []:
        name, equals, value = part.partition("=")
        if not equals or name.strip() in found:
            raise ConfigError(f"{part!r} cannot be read", where=where, remedy="Write option=value,option=value")
        found[name.strip()] = _value(value.strip())
    return found


def _parts(text: str) -> list[str]:
    """Split at commas outside lists, tables and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        depth += (letter in "[{") - (letter in "]}") if not quote else 0
        if letter == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _value(text: str) -> Any:
    try:
        return toml.loads(f"value = {text}")["value"]
    except toml.TOMLDecodeError:
        return text
