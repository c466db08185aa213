"""A name that is not known: which one was meant, and which there are."""

from __future__ import annotations

from collections.abc import Iterable


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The one of these names that was meant, most likely; None where nothing is like it."""
    import difflib  # only where something is wrong already

    lower = {one.lower(): one for one in reversed(list(names))}
    near = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.6)
    return lower[near[0]] if near else None


def known_names(name: str, names: Iterable[str]) -> str:
    """A remedy: ``Did you mean 'rpi4'? Known are generic-cpu, rpi4``; without the question where nothing is like it."""
    listed = list(names)
    near = nearest(name, listed)
    question = "" if near is None else f"Did you mean {near!r}? "
    return f"{question}Known are {', '.join(listed) or 'none'}"
