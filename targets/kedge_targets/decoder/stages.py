"""A decoder in stages, one after the other: consecutive layers with their caches, here or on another device."""

from __future__ import annotations

import abc
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.errors import InputError
from kedge_targets.decoder.session import DecoderSession
from kedge_targets.decoder.windows import Window

Array = npt.NDArray[Any]


class Stage(abc.ABC):
    """Consecutive layers of a decoder, with caches for several sequences; for one thread at a time.

    Attributes:
        vocabulary: number of tokens, of the stage with the head.
        windows: see :attr:`kedge_targets.decoder.session.DecoderSession.windows`; of a stage on another device they are
            known once it is :meth:`ready`.
    """

    vocabulary = 0
    windows: Collection[Window] = ()

    @abc.abstractmethod
    def run(self, first: int, values: Array, lengths: Array, keep: int) -> Array:
        """Append positions to the slots from ``first`` on.

        Args:
            values: the first stage's tokens, int64 [rows, step]; hidden states, float32 [rows, step, channels], of any
                other stage.
            lengths: positions of each row before this step, int64 [rows].
            keep: number of last positions that are returned.

        Returns:
            Hidden states after the stage's last layer, float32 [rows, keep, channels].

        Raises:
            InputError: the runtime cannot run the step.
        """

    @abc.abstractmethod
    def copy(self, source: int, to: int, positions: int) -> None:
        """Copy the first positions of one slot to another."""

    def logits(self, hidden: Array) -> Array:
        """Return logits, float32 [rows, positions, vocabulary], of the last stage's output. The first stage has the
        head, so that no logits cross a link, and a head that is the embedding is stored once."""
        raise InputError("this part of the model has no head")

    def ready(self) -> bool:
        """See :meth:`kedge_targets.decoder.session.DecoderSession.ready`."""
        return True

    @property
    @abc.abstractmethod
    def cache_bytes(self) -> int:
        """Return the bytes of the caches that are in this process."""

    def close(self) -> None:
        """Release the stage's resources."""


class StagedDecoder(DecoderSession):
    """A decoder session over stages.

    Args:
        stages: in order; the first has the head. They have ``slots`` slots of ``context`` positions.
    """

    def __init__(self, stages: Sequence[Stage], *, slots: int, context: int) -> None:
        super().__init__(slots=slots, context=context, vocabulary=stages[0].vocabulary)
        self._stages = tuple(stages)

    @property
    def windows(self) -> Collection[Window]:
        """See :attr:`kedge_targets.decoder.session.DecoderSession.windows`."""
        return {window for stage in self._stages for window in stage.windows}

    def ready(self) -> bool:
        """See :meth:`kedge_targets.decoder.session.DecoderSession.ready`."""
        found = [stage.ready() for stage in self._stages]
        if all(found):
            return True
        self.lengths = np.zeros_like(self.lengths)
        return False

    def copy(self, source: int, to: int, positions: int) -> None:
        """See :meth:`kedge_targets.decoder.session.DecoderSession.copy`."""
        for stage in self._stages:
            stage.copy(source, to, positions)
        self.lengths[to] = positions

    def _run(self, first: int, tokens: Array, lengths: Array, keep: int) -> Array:
        values = tokens
        for stage in self._stages[:-1]:
            values = stage.run(first, values, lengths, tokens.shape[1])
        return self._stages[0].logits(self._stages[-1].run(first, values, lengths, keep))

    @property
    def cache_bytes(self) -> int:
        """See :attr:`kedge_targets.decoder.session.DecoderSession.cache_bytes`."""
        return sum(stage.cache_bytes for stage in self._stages)

    def close(self) -> None:
        """See :meth:`kedge_targets.decoder.session.DecoderSession.close`."""
        for stage in self._stages:
            stage.close()
