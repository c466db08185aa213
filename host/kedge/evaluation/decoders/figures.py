"""Computes perplexity, divergence from the float model and top-token agreement, summed up sequence by sequence."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The figures of one compressed decoder.

    Attributes:
        perplexity, reference: perplexity of the compressed and of the float model, on the same tokens.
        ratio_error: standard error of their ratio over the sequences.
        kl: mean KL divergence of the compressed model's distribution from the float model's, nats per token.
        kl_error: standard error of ``kl``, likewise.
        agreement: share of positions whose most likely token is the float model's.
        agreement_error: standard error of ``agreement``, likewise.
        tokens: number of evaluated positions.
    """

    perplexity: float
    reference: float
    ratio_error: float
    kl: float
    kl_error: float
    agreement: float
    agreement_error: float
    tokens: int

    @property
    def ratio(self) -> float:
        """Return the perplexity divided by the float model's."""
        return self.perplexity / self.reference

    @property
    def said(self) -> str:
        """Return the figures that are relative to the float model, in words with their standard errors."""
        return (
            f"perplexity × {self.ratio:.4f} ± {self.ratio_error:.4f}, KL {self.kl:.4f} ± {self.kl_error:.4f}, "
            f"same top {self.agreement:.3f} ± {self.agreement_error:.3f}"
        )


@dataclass
class _Sums:
    """Sums over the positions of one sequence."""

    nats: float = 0.0
    reference_nats: float = 0.0
    kl: float = 0.0
    agreed: int = 0
    tokens: int = 0


@dataclass
class Tally:
    """Sums over sequences, added in pieces of any number of positions."""

    _sequences: list[_Sums] = field(default_factory=list)

    def begin(self) -> None:
        """Begin another sequence."""
        self._sequences.append(_Sums())

    def add(self, logits: Array, reference: Array, targets: Array) -> None:
        """Add some positions.

        Args:
            logits, reference: float32 [positions, vocabulary].
            targets: the tokens that actually follow, int64 [positions].
        """
        own, true = log_softmax(logits), log_softmax(reference)
        rows, sums = np.arange(len(targets)), self._sequences[-1]
        sums.nats -= float(own[rows, targets].sum())
        sums.reference_nats -= float(true[rows, targets].sum())
        sums.kl += float((np.exp(true) * (true - own)).sum())
        sums.agreed += int((logits.argmax(-1) == reference.argmax(-1)).sum())
        sums.tokens += len(targets)

    def figures(self) -> Figures:
        """Return the figures of all positions added."""
        counts = np.array([one.tokens for one in self._sequences], np.float64)
        nats, true = (np.array([getattr(one, name) for one in self._sequences]) for name in ("nats", "reference_nats"))
        lost, lost_error = _mean(nats - true, counts)
        kl, kl_error = _mean(np.array([one.kl for one in self._sequences]), counts)
        agreement, agreement_error = _mean(np.array([one.agreed for one in self._sequences]), counts)
        tokens = int(counts.sum())
        return Figures(
            perplexity=math.exp(min(nats.sum() / tokens, 700.0)),
            reference=math.exp(min(true.sum() / tokens, 700.0)),
            ratio_error=math.exp(min(lost, 700.0)) * lost_error,
            kl=max(kl, 0.0),
            kl_error=kl_error,
            agreement=agreement,
            agreement_error=agreement_error,
            tokens=tokens,
        )


def _mean(sums: Array, counts: Array) -> tuple[float, float]:
    """Return the mean over all positions and its standard error over the sequences.

    Args:
        sums: of each sequence's positions.
        counts: their numbers.
    """
    mean = sums.sum() / counts.sum()
    spread = ((sums / np.maximum(counts, 1) - mean) ** 2 * counts).sum() / counts.sum()
    return float(mean), float(np.sqrt(spread / max(1, len(counts) - 1)))


def log_softmax(logits: Array) -> Array:
    """Return the log-softmax along the last axis, float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    found: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return found
