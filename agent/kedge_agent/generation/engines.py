"""Several engines that act as one: each runs its own sequences, and while one waits for another device the others
compute."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import fields

from kedge_agent.generation.engine import Engine
from kedge_agent.generation.statistics import GenerationStatistics
from kedge_agent.generation.tickets import Order, Ticket
from kedge_targets.decoder.session import DecoderSession


class Engines:
    """See :class:`kedge_agent.generation.engine.Engine`, whose public members these are.

    Args:
        engines: at least one, all of the same model.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self._engines = tuple(engines)
        self._choosing = threading.Lock()

    @property
    def session(self) -> DecoderSession:
        """Return one of the sessions; they differ in nothing but their slots."""
        return self._engines[0].session

    @property
    def statistics(self) -> GenerationStatistics:
        """Return the sums over all engines."""
        found = GenerationStatistics()
        for field in fields(GenerationStatistics):
            each = [getattr(one.statistics, field.name) for one in self._engines]
            if isinstance(each[0], list):
                setattr(found, field.name, [sum(column) for column in zip(*each, strict=True)])
            else:
                setattr(found, field.name, sum(each, type(each[0])()))
        return found

    @property
    def cache_bytes(self) -> int:
        """Return the bytes of the caches in this process."""
        return sum(one.cache_bytes for one in self._engines)

    @property
    def running(self) -> int:
        """Return the number of answers that have a slot."""
        return sum(one.running for one in self._engines)

    @property
    def waiting(self) -> int:
        """Return the number of answers that have no slot yet."""
        return sum(one.waiting for one in self._engines)

    @property
    def positions(self) -> int:
        """Return the number of positions in use in all slots."""
        return sum(one.positions for one in self._engines)

    def submit(self, order: Order) -> Ticket:
        """Queue a request at the engine with the fewest answers; of several, at the one that knows most of the prompt.

        Raises:
            InputError, BusyError: see :meth:`kedge_agent.generation.engine.Engine.submit`.
        """
        with self._choosing:  # two at once would choose the same engine, and leave another one idle
            return min(self._engines, key=lambda one: (one.answers, -one.known(order.prompt))).submit(order)

    def retire(self, seconds: float) -> None:
        """See :meth:`kedge_agent.generation.engine.Engine.retire`."""
        for one in self._engines:
            one.retire(seconds)

    def close(self) -> None:
        """End all answers, and release the sessions."""
        for one in self._engines:
            one.close()
