"""Suggestions for an unknown name: the most similar name, and all known names."""

from __future__ import annotations

from collections.abc import Iterable


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the most similar of these names, or None if none is similar."""
    import difflib  # only where something is wrong already

    lower = {one.lower(): one for one in reversed(list(names))}
    near = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.6)
    return lower[near[0]] if near else None


def known_names(name: str, names: Iterable[str]) -> str:
    """Return a remedy: ``Did you mean 'rpi4'? Known are generic-cpu, rpi4``; without the question if no name is
    similar."""
    listed = list(names)
    near = nearest(name, listed)
    question = "" if near is None else f"Did you mean {near!r}? "
    return f"{question}Known are {', '.join(listed) or 'none'}"
