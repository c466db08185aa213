"""Leaves out the tokens that the model's author does not want in an answer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.bundle.generation import AnswerRules

Array = npt.NDArray[Any]


def is_free(rules: AnswerRules) -> bool:
    """Return whether any token may follow anywhere."""
    return not (rules.suppressed or rules.suppressed_first or rules.no_repeat or rules.least)


def allowed(rules: AnswerRules, logits: Array, tokens: Sequence[int], written: int, ends: Collection[int]) -> Array:
    """Return logits in which tokens that may not follow are negative infinity.

    Args:
        logits: float32 [vocabulary]; not modified.
        tokens: all tokens of the decoder so far, the given beginning too.
        written: the number of tokens of the answer so far.
        ends: tokens that end the answer.
    """
    never = list(rules.suppressed)
    if not written:
        never += rules.suppressed_first
    if written < rules.least:
        never += ends
    if rules.no_repeat:
        never += _repeating(tokens, rules.no_repeat)
    never = [token for token in never if token < len(logits)]
    if not never:
        return logits
    found = logits.copy()
    found[never] = -np.inf
    return found


def _repeating(tokens: Sequence[int], size: int) -> list[int]:
    """Return the tokens that would complete a run of ``size`` tokens that was there before."""
    if len(tokens) + 1 < size:
        return []
    last = list(tokens[len(tokens) - size + 1 :]) if size > 1 else []
    every = list(tokens)
    return [every[at + size - 1] for at in range(len(every) - size + 1) if every[at : at + size - 1] == last]
