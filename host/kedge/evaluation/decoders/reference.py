"""Computes the float model's answers layer by layer, with only one layer's weights in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kedge.evaluation.decoders.figures import Figures, Tally
from kedge_targets.decoder.contract import LayerRunner
from kedge_targets.decoder.session import DecoderSession
from kedge_targets.decoder.spec import Array, DecoderSpec

POSITIONS = 64
"""Number of positions whose logits are in memory together."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The float model's answers to some sequences.

    Attributes:
        sequences: tokens of each sequence.
        hidden: the head's input for each sequence, float32 [positions, channels].
        head: the head's weight, float32 [vocabulary, channels].
    """

    sequences: list[list[int]]
    hidden: list[Array]
    head: Array

    def logits(self, sequence: int, first: int, last: int) -> Array:
        """Return logits of these positions, float32 [positions, vocabulary]."""
        found: Array = self.hidden[sequence][first:last] @ self.head.T
        return found


def embedded(spec: DecoderSpec, table: Array, positions: Array | None, sequences: list[list[int]]) -> list[Array]:
    """Return each sequence as the first layer's input."""
    found = []
    for sequence in sequences:
        hidden = table[np.asarray(sequence)] * np.float32(spec.embedding_scale)
        found.append(hidden if positions is None else hidden + positions[: len(sequence)])
    return found


def through(
    hidden: list[Array], layers: int, runner: Callable[[int], LayerRunner], heard: Callable[[int, int], None]
) -> list[Array]:
    """Run sequences through all layers."""
    for index in range(layers):
        heard(index, layers)
        one = runner(index)
        hidden = [one.run(sequence)[0] for sequence in hidden]
    return hidden


def normalized(spec: DecoderSpec, norm: dict[str, Array], hidden: Array) -> Array:
    """Apply the norm before the head."""
    values = hidden.astype(np.float32, copy=False)
    if spec.norm == "layer":
        values = values - values.mean(-1, keepdims=True)
    size = np.sqrt((values**2).mean(-1, keepdims=True) + np.float32(spec.norm_epsilon))
    found: Array = values / size * (norm["norm"] + np.float32(spec.norm_offset))
    return found + norm["norm.bias"] if "norm.bias" in norm else found


def judged(session: DecoderSession, reference: Reference, heard: Callable[[int, int], None]) -> Figures:
    """Evaluate a session on the reference's sequences; uses the first slot."""
    tally = Tally()
    for at, sequence in enumerate(reference.sequences):
        heard(at, len(reference.sequences))
        tally.begin()
        session.truncate(0, 0)
        for first in range(0, len(sequence) - 1, POSITIONS):
            last = min(first + POSITIONS, len(sequence) - 1)
            logits = session.extend(0, sequence[first:last], keep=last - first)
            tally.add(logits, reference.logits(at, first, last), np.asarray(sequence[first + 1 : last + 1]))
    session.truncate(0, 0)
    return tally.figures()
