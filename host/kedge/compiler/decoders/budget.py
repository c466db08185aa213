"""The limits that a compressed decoder has to keep: of its loss, its bytes, and its pace."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kedge.evaluation.decoders.figures import Figures
from kedge.search.budget import size_bytes


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The limits.

    Attributes:
        max_ratio: largest ratio of the perplexity to the float model's.
        max_perplexity: largest perplexity.
        max_kl: largest KL divergence from the float model, nats per token.
        max_size: largest size of the files, as :func:`kedge.search.budget.size_bytes` reads it.
        max_memory: largest memory of files and caches, likewise.
        min_pace: fewest tokens a second that one sequence is written at.
    """

    max_ratio: float | None = None
    max_perplexity: float | None = None
    max_kl: float | None = None
    max_size: str | None = None
    max_memory: str | None = None
    min_pace: float | None = None

    def broken(self, figures: Figures) -> str:
        """Describe which limits the figures exceed; empty if none."""
        checks = (
            ("perplexity ×", figures.ratio, self.max_ratio),
            ("perplexity", figures.perplexity, self.max_perplexity),
            ("KL", figures.kl, self.max_kl),
        )
        over = [
            f"{name} {value:.4g} is over {most:.4g}"
            for name, value, most in checks
            if most is not None and value > most
        ]
        return ", ".join(over)

    def outgrown(self, *, size: int, memory: int, source: int) -> str:
        """Describe which limits these bytes exceed; empty if none.

        Args:
            source: bytes of the user's files, of which a limit may be a share.
        """
        checks = (("files", size, self.max_size, "--max-size"), ("memory", memory, self.max_memory, "--max-memory"))
        over = []
        for name, value, limit, flag in checks:
            if limit is not None and value > (most := size_bytes(limit, of=source, where=flag)):
                over.append(f"{name} of {value / 1e6:.4g} MB are over {most / 1e6:.4g} MB")
        return ", ".join(over)

    def slow(self, pace: float) -> str:
        """Describe by how much a pace, in tokens a second, is too slow; empty if it is not."""
        if self.min_pace is None or pace >= self.min_pace:
            return ""
        return f"writes {pace:.4g} tokens a second, {self.min_pace:.4g} are wanted"

    def excess(self, figures: Figures) -> float:
        """Return the loss divided by the allowed loss, in nats a token, of the limit that is exceeded most; infinity if
        a limit allows none."""
        lost = math.log(figures.ratio)
        pairs = [
            (lost, None if self.max_ratio is None else math.log(self.max_ratio)),
            (lost, None if self.max_perplexity is None else math.log(self.max_perplexity / figures.reference)),
            (figures.kl, self.max_kl),
        ]
        shares = [
            loss / allowed if allowed > 0 else math.inf for loss, allowed in pairs if allowed is not None and loss > 0
        ]
        return max(shares, default=0.0)
