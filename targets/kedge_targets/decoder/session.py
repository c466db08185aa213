"""A loaded decoder on the device: several sequences side by side, each in a slot with its own cache."""

from __future__ import annotations

import abc
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.errors import InputError
from kedge_targets.decoder.windows import Window

Array = npt.NDArray[Any]


class DecoderSession(abc.ABC):
    """A decoder session with slots of ``context`` positions, for one thread at a time.

    Attributes:
        slots, context, vocabulary: numbers of slots, of positions per slot, and of tokens in the vocabulary.
        lengths: number of positions in use in each slot, int64 [slots].
        has_encoder: whether each slot needs a source.
        detail: what really runs it, in words, where the runtime's name does not say it all.

    A decoder with an encoder writes about the source that each slot was given last (:meth:`attend`).
    """

    has_encoder = False
    detail = ""

    def __init__(self, *, slots: int, context: int, vocabulary: int) -> None:
        self.slots = slots
        self.context = context
        self.vocabulary = vocabulary
        self.lengths = np.zeros(slots, np.int64)

    @property
    def windows(self) -> Collection[Window]:
        """Return the caches that drop positions which are out of sight; none if all hold the whole context."""
        return ()

    def attend(self, slot: int, source: Array) -> None:
        """Give a slot another source to write about, and empty it.

        Raises:
            InputError: see :meth:`check_source`.
        """
        self.check_source(source)
        self.lengths[slot] = 0
        self._encode(slot, source)

    def check_source(self, source: Array) -> None:
        """Check a source: tokens int64 [count], or features float32 [mels, frames].

        Raises:
            InputError: the model takes none, or not this one.
        """
        raise InputError("the model has no encoder", remedy="Give the text as the prompt")

    def _encode(self, slot: int, source: Array) -> None:
        """Compute what a slot attends to."""

    def extend(self, slot: int, tokens: Sequence[int], *, keep: int = 1) -> Array:
        """Append tokens to one slot.

        Args:
            keep: number of last tokens whose logits are returned.

        Returns:
            float32 [keep, vocabulary]: each row predicts the token after its own.

        Raises:
            InputError: there is no token, a token is outside the vocabulary, or the context has no room for them.
        """
        self._check(tokens, int(self.lengths[slot]))
        found = self._run(slot, np.asarray([tokens], np.int64), self.lengths[slot : slot + 1], keep)
        self.lengths[slot] += len(tokens)
        logits: Array = found[0]
        return logits

    def step(self, tokens: Mapping[int, int]) -> dict[int, Array]:
        """Append one token to each of several slots in one step.

        Args:
            tokens: slot → token.

        Returns:
            Slot → float32 [vocabulary].

        Raises:
            InputError: see :meth:`extend`.
        """
        for slot, token in tokens.items():
            self._check([token], int(self.lengths[slot]))
        found: dict[int, Array] = {}
        for first, last in self._spans(tokens):
            for slot in range(first, last):
                # Idle slots between the others are computed along; what they write lies beyond their length.
                if slot not in tokens and self.lengths[slot] == self.context:
                    self.lengths[slot] -= 1
            column = np.array([tokens.get(slot, 0) for slot in range(first, last)], np.int64)[:, None]
            logits = self._run(first, column, self.lengths[first:last], 1)
            found |= {slot: logits[slot - first, 0] for slot in range(first, last) if slot in tokens}
        for slot in tokens:
            self.lengths[slot] += 1
        return found

    def _spans(self, slots: Collection[int]) -> list[tuple[int, int]]:
        """Return the first slot and the end of each step that covers these slots."""
        first, last = min(slots), max(slots) + 1
        if not self.windows:
            return [(first, last)]
        # An idle slot that is computed along would drop positions that it still needs.
        starts = [slot for slot in sorted(slots) if slot - 1 not in slots]
        return [(start, next(at for at in range(start, last + 1) if at not in slots)) for start in starts]

    def truncate(self, slot: int, length: int) -> None:
        """Keep only the first ``length`` positions of a slot.

        Raises:
            InputError: see :meth:`can_keep`.
        """
        there = int(self.lengths[slot])
        if length < there and not self.can_keep(there, length):
            raise InputError(f"{length} of {there} positions cannot be kept: what they see was dropped")
        self.lengths[slot] = min(length, there)

    def can_keep(self, positions: int, kept: int) -> bool:
        """Return whether a slot of so many positions can be cut to the first ``kept``, or these be copied."""
        return kept == 0 or all(window.can_drop(positions, kept) for window in self.windows)

    def ready(self) -> bool:
        """Return whether the slots still hold what was put into them. If not, they are empty and can be filled again.

        Raises:
            KedgeError: another device that has a part of the model cannot be reached.
        """
        return True

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
        """Copy the first positions of one slot, and its source, to another, which has that length afterwards."""

    @abc.abstractmethod
    def _run(self, first: int, tokens: Array, lengths: Array, keep: int) -> Array:
        """Return logits [rows, keep, vocabulary] of the slots from ``first`` on, which have these lengths before."""

    @property
    @abc.abstractmethod
    def cache_bytes(self) -> int:
        """Return the bytes of the caches of all slots."""

    def close(self) -> None:
        """Release the session's resources."""
