"""Reads the equation of an Einsum."""

from __future__ import annotations

import math
from collections.abc import Sequence


def summed(equation: str, shapes: Sequence[Sequence[int]]) -> int:
    """Return the product of the axes that are summed over: what each number of the answer costs in multiplications.

    Args:
        equation: as in ``bid,bjd->bij``, with or without ``...`` and the answer.
        shapes: of the inputs.
    """
    terms, arrow, kept = equation.replace(" ", "").partition("->")
    sizes: dict[str, int] = {}
    for shape, term in zip(shapes, terms.split(","), strict=True):
        before, _, after = term.partition("...")
        ends = shape[-len(after) :] if after else ()
        sizes |= {**dict(zip(before, shape, strict=False)), **dict(zip(after, ends, strict=False))}
    if not arrow:
        kept = "".join(one for one in sizes if terms.count(one) == 1)
    return math.prod(max(1, int(size)) for letter, size in sizes.items() if letter not in kept)
