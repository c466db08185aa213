"""How fast a language model answers: the time to the first token and the time of each token after it, one value of each
an answer, counted as calls are (:mod:`kedge_agent.counters`). How long a whole answer takes says little: it depends on
its length."""

from __future__ import annotations

from kedge_agent import counters
from kedge_agent.slots import ModelFolder
from kedge_protocol import latency_buckets
from kedge_protocol.telemetry import GenerationTelemetry


class Paces:
    """This process's counts of one bundle.

    Args:
        folder: the model's.
        digest: of the bundle.
        generation: the model's generation when the bundle was loaded.
    """

    def __init__(self, folder: ModelFolder, *, digest: str, generation: int) -> None:
        self._first = counters.open_counter(folder.first_tokens, digest=digest, generation=generation)
        self._token = counters.open_counter(folder.token_times, digest=digest, generation=generation)

    def record(self, pace: tuple[float, float | None] | None) -> None:
        """Count one answer.

        Args:
            pace: see :attr:`kedge_agent.generation.generator.AnswerStream.pace`.
        """
        if pace is None:
            return
        first, each = pace
        if self._first is not None:
            self._first.record(int(first * 1e9))
        if each is not None and self._token is not None:
            self._token.record(int(each * 1e9))

    def close(self) -> None:
        """Mark the files as final."""
        for counter in (self._first, self._token):
            if counter is not None:
                counter.close()


class PaceReader:
    """Sums what all processes count of one model.

    Args:
        folder: the model's; what was counted before belongs to no interval.
    """

    def __init__(self, folder: ModelFolder) -> None:
        self._folders = (folder.first_tokens, folder.token_times)
        self._before = self._totals()

    def take(self) -> GenerationTelemetry | None:
        """Return the counts since the last call; None without any."""
        now = self._totals()
        first, token = (new - old for new, old in zip(now, self._before, strict=True))
        self._before = now
        if not first.inferences:
            return None
        return GenerationTelemetry(
            first_token_buckets=latency_buckets.sparse(first.buckets),
            token_buckets=latency_buckets.sparse(token.buckets),
        )

    def look(self) -> None:
        """Fold the files of ended processes."""
        self._totals()

    def _totals(self) -> tuple[counters.Totals, ...]:
        return tuple(counters.collect(folder) for folder in self._folders)
