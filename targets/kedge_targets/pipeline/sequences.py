"""Greedy decoding of CTC scores (Graves et al., 2006): takes the best class of each step, joins repetitions and drops
blanks."""

from __future__ import annotations

from collections.abc import Sequence as Names
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.bundle.pipeline import Sequence
from kedge_protocol.errors import InputError
from kedge_targets.pipeline.answers import Text

Array = npt.NDArray[Any]


def decode(scores: Array, how: Sequence, alphabet: Names[str]) -> Text:
    """Return the text of one sample.

    Args:
        scores: steps x classes, probabilities or logits of a softmax.
        alphabet: the characters of the classes, without the blank.

    Raises:
        InputError: a class has no character.
    """
    characters = [*alphabet, " "] if how.space else list(alphabet)
    characters.insert(min(how.blank, len(characters)), "")
    if scores.ndim != 2 or scores.shape[1] > len(characters):
        shape = "x".join(map(str, scores.shape))
        raise InputError(
            f"scores {shape} have more classes than the alphabet's {len(characters)} (the blank among them)",
            remedy="Give the alphabet with --labels, one character on each line",
        )
    best = scores.argmax(axis=1)
    changed = np.flatnonzero(np.diff(best, prepend=-1))
    kept = [at for at in changed if best[at] != how.blank]
    probabilities = _probabilities(scores)
    sure = [float(probabilities[at, best[at]]) for at in kept]
    return Text("".join(characters[best[at]] for at in kept), float(np.mean(sure)) if sure else 0.0)


def _probabilities(scores: Array) -> Array:
    rows = scores.astype(np.float64)
    if rows.min(initial=0.0) >= 0.0 and np.allclose(rows.sum(axis=1), 1.0, atol=0.05):
        return rows
    powers = np.exp(rows - rows.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))
