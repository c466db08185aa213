"""A loaded decoder on the device: several sequences side by side, each in a slot with a cache of its own."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.errors import InputError

Array = npt.NDArray[Any]


class DecoderSession(abc.ABC):
    """Slots of ``context`` positions. One thread at a time.

    Attributes:
        slots, context, vocabulary: how many of each.
        lengths: positions in use of each slot, int64 [slots].
    """

    def __init__(self, *, slots: int, context: int, vocabulary: int) -> None:
        self.slots = slots
        self.context = context
        self.vocabulary = vocabulary
        self.lengths = np.zeros(slots, np.int64)

    def extend(self, slot: int, tokens: Sequence[int], *, keep: int = 1) -> Array:
        """Append tokens to one slot.

        Args:
            keep: of how many of the last tokens the logits are wanted.

        Returns:
            float32 [keep, vocabulary]: row ``i`` says what follows the token that it belongs to.

        Raises:
            InputError: no token, a token beyond the vocabulary, or more than the context has room for.
        """
        self._check(tokens, int(self.lengths[slot]))
        found = self._run(slot, np.asarray([tokens], np.int64), self.lengths[slot : slot + 1], keep)
        self.lengths[slot] += len(tokens)
        logits: Array = found[0]
        return logits

    def step(self, tokens: Mapping[int, int]) -> dict[int, Array]:
        """Append one token to each of several slots at once.

        Args:
            tokens: slot → token.

        Returns:
            Slot → float32 [vocabulary].

        Raises:
            InputError: see :meth:`extend`.
        """
        for slot, token in tokens.items():
            self._check([token], int(self.lengths[slot]))
        first, last = min(tokens), max(tokens) + 1
        for slot in range(first, last):
            # Idle slots between the others are computed along; what they write lies beyond their length.
            if slot not in tokens and self.lengths[slot] == self.context:
                self.lengths[slot] -= 1
        column = np.array([[tokens.get(slot, 0)] for slot in range(first, last)], np.int64)
        found = self._run(first, column, self.lengths[first:last], 1)
        for slot in tokens:
            self.lengths[slot] += 1
        return {slot: found[slot - first, 0] for slot in tokens}

    def truncate(self, slot: int, length: int) -> None:
        """Forget what lies beyond the first ``length`` positions of a slot."""
        self.lengths[slot] = min(length, int(self.lengths[slot]))

    def _check(self, tokens: Sequence[int], length: int) -> None:
        if not len(tokens):
            raise InputError("no token was given")
        if length + len(tokens) > self.context:
            raise InputError(
                f"{length + len(tokens)} positions are needed, the context has {self.context}",
                remedy="Give a shorter prompt or ask for fewer tokens",
            )
        if min(tokens) < 0 or max(tokens) >= self.vocabulary:
            raise InputError(f"a token lies outside the vocabulary of {self.vocabulary}")

    @abc.abstractmethod
    def copy(self, source: int, to: int, positions: int) -> None:
        """Make the first positions of one slot those of another, which has that length afterwards."""

    @abc.abstractmethod
    def _run(self, first: int, tokens: Array, lengths: Array, keep: int) -> Array:
        """Logits [rows, keep, vocabulary] of the slots from ``first`` on, which have these lengths before."""

    @property
    @abc.abstractmethod
    def cache_bytes(self) -> int:
        """What the caches of all slots take."""

    def close(self) -> None:
        """Release the session's resources."""
